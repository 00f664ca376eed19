"""DoRA: LoRA on the direction of a weight's rows, and their norms learned apart (Liu et al. 2024, arXiv:2402.09353)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from lowres_ft.methods.base import LowRank, LowRankMethod

if TYPE_CHECKING:
    from peft import PeftConfig


class Dora(LowRankMethod):
    """y = m / ||W + s B A|| (W + s B A) x, where m (outputs) is learned and the norm of each row is held constant."""

    kind: Literal["dora"] = "dora"

    def adapter(self, layer: str) -> LowRank:
        return replace(super().adapter(layer), magnitude=True)

    def peft_config(self, layers: Sequence[str], **border: Any) -> "PeftConfig":
        return self.lora_config(use_dora=True, **border)
