"""LoRA: low-rank adapters beside frozen linear layers (Hu et al. 2021, arXiv:2106.09685)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from lowres_ft.methods.base import LowRankMethod

if TYPE_CHECKING:
    from peft import PeftConfig


class Lora(LowRankMethod):
    """y = W x + (alpha / rank) B A dropout(x), where W is frozen, A is (rank, inputs) and B is (outputs, rank)."""

    kind: Literal["lora"] = "lora"

    def peft_config(self, layers: Sequence[str], **border: Any) -> "PeftConfig":
        return self.lora_config(**border)
