"""LoRA: low-rank adapters beside frozen linear layers (Hu et al. 2021, arXiv:2106.09685)."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from lowres_ft import libraries
from lowres_ft.methods.base import LowRank, Method

if TYPE_CHECKING:
    from peft import PeftConfig

Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]


class Lora(Method):
    """y = W x + (alpha / rank) B A dropout(x), where W is frozen, A is (rank, inputs) and B is (outputs, rank)."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1)
    """Rank of the update; adapter size and its memory grow with it."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale of the update: alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input, keyed by seed, step, example and layer."""
    targets: Literal["all-linear", "attention"] | Names = "all-linear"
    """Layers to adapt: all linear layers of the base, those of its attention, or a list of their names."""

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def wanted(self) -> str | tuple[str, ...]:
        return self.targets

    def low_rank(self) -> LowRank:
        return LowRank(self.rank, self.scaling, self.dropout)

    def peft_config(self, **border: Any) -> "PeftConfig":
        config: PeftConfig = libraries.peft().LoraConfig(
            r=self.rank,
            lora_alpha=int(self.alpha) if self.alpha.is_integer() else self.alpha,
            use_rslora=self.rslora,
            lora_dropout=self.dropout,
            inference_mode=True,
            **border,
        )
        return config
