"""LoRA: low-rank adapters beside frozen linear layers (Hu et al. 2021, arXiv:2106.09685)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from lowres_ft.methods.base import Init, LowRank, LowRankMethod

if TYPE_CHECKING:
    from peft import PeftConfig


class Lora(LowRankMethod):
    """y = W x + (alpha / rank) B A dropout(x), where W is frozen, A is (rank, inputs) and B is (outputs, rank)."""

    kind: Literal["lora"] = "lora"
    init: Init = "default"
    """Where A and B begin: `default` at no update; `pissa` at the principal part of W, which is taken back (Meng et al.
    2024, arXiv:2404.02948); `loftq` at what quantization lost of W (Li et al. 2023, arXiv:2310.08659)."""

    @property
    def corrects_quantization(self) -> bool:
        return self.init == "loftq"

    def conflict(self, quantize: str) -> str | None:
        if self.init == "pissa" and quantize != "none":
            return (
                f"method.init=pissa trains a part of W, which {quantize} weights do not hold; use model.quantize=none"
            )
        if self.init == "loftq" and quantize == "none":
            return "method.init=loftq makes up for quantization, and there is none; use model.quantize=nf4 or int8"
        return None

    def adapter(self, layer: str) -> LowRank:
        return replace(super().adapter(layer), init=self.init)

    def peft_config(self, layers: Sequence[str], **border: Any) -> "PeftConfig":
        if self.init == "pissa":  # plain LoRA of twice the rank and the same factor
            rank = 2 * self.rank
            return self.lora_config(r=rank, lora_alpha=self.scaling * rank, use_rslora=False, **border)
        return self.lora_config(**border)
