"""What a fine-tuning method is: its fields in a recipe, and what it says about a model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lowres_ft import libraries
from lowres_ft.errors import ModelError, nearest
from lowres_ft.spec import Spec

if TYPE_CHECKING:
    from peft import PeftConfig

Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


Init = Literal["default", "pissa", "loftq"]


@dataclass(frozen=True)
class LowRank:
    """The update scaling * B A of a linear layer, A (rank, inputs) and B (outputs, rank)."""

    rank: int
    scaling: float
    dropout: float = 0.0
    magnitude: bool = False
    """True where the norm of each row of W + scaling * B A is learned apart from its direction."""
    init: Init = "default"
    """Where A and B begin; PiSSA's update is that of the trained factors less that of the first ones."""

    def parameters(self, inputs: int, outputs: int) -> int:
        """How many are trained."""
        return self.rank * (inputs + outputs) + (outputs if self.magnitude else 0)

    def saved(self) -> "LowRank":
        """The form that a bundle holds: PiSSA's two updates are one of twice the rank."""
        return replace(self, rank=2 * self.rank if self.init == "pissa" else self.rank, init="default")


@dataclass(frozen=True)
class Scale:
    """A learned factor for each input or each output of a linear layer."""

    of: Literal["inputs", "outputs"]

    def parameters(self, inputs: int, outputs: int) -> int:
        """How many are trained."""
        return inputs if self.of == "inputs" else outputs

    def saved(self) -> "Scale":
        """The form that a bundle holds: the same."""
        return self


Adapter = LowRank | Scale


class Method(Spec):
    """A fine-tuning method. Its fields are its part of the recipe."""

    kind: str
    """Name of the method's file."""
    trains_base: ClassVar[bool] = False
    """True when every weight is trained and the bundle holds a whole model; else it holds an adapter."""

    head_only: ClassVar[bool] = False
    """True when nothing of the base is trained or adapted."""

    @property
    def corrects_quantization(self) -> bool:
        """True where the adapter makes up for what quantization lost, and so belongs to the quantized base alone."""
        return False

    def conflict(self, quantize: str) -> str | None:
        """Why this method cannot work on a base held as `quantize`; None when it can."""
        return None

    def choose(self, layers: Sequence[str]) -> tuple[str, ...]:
        """The layers to adapt, of the base's linear `layers` by name.

        Raises:
            ModelError: The method's fields name none of them, or a layer that is not there.
        """
        return ()

    def adapter(self, layer: str) -> Adapter | None:
        """What a chosen layer gets; None where nothing is added."""
        return None

    def rate(self, parameter: str) -> float:
        """The learning rate of a parameter, by its name, over the recipe's."""
        return 1.0

    def peft_config(self, layers: Sequence[str], **border: Any) -> "PeftConfig":
        """The configuration that PEFT reads, for an adapter of `layers`.

        `border` holds what the method does not know: base_model_name_or_path, revision, task_type,
        target_modules (PEFT's names of `layers`), modules_to_save (heads) and fan_in_fan_out (GPT-2's linear layers).
        """
        raise NotImplementedError(f"{self.kind} is not saved as an adapter")


PLUGIN = Method


class LowRankMethod(Method):
    """What LoRA and its kin have in common: the update s B A of frozen layers."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update; adapter size and its memory grow with it."""
    alpha: float = Field(default=32.0, gt=0, le=1e6)
    """Scale of the update: alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input, keyed by seed, step, example and layer."""
    targets: Literal["all-linear", "attention"] | Names = "all-linear"
    """Layers to adapt: all linear layers of the base, those of its attention, or a list of their names."""

    rate_ratio: float = Field(default=1.0, ge=1)
    """Learning rate of B over that of A (LoRA+, Hayou et al. 2024, arXiv:2402.12354)."""

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def choose(self, layers: Sequence[str]) -> tuple[str, ...]:
        return select(self.targets, layers)

    def adapter(self, layer: str) -> LowRank:
        return LowRank(self.rank, self.scaling, self.dropout)

    def rate(self, parameter: str) -> float:
        return self.rate_ratio if parameter.endswith(".lora_B") else 1.0

    def lora_config(self, **fields: Any) -> "PeftConfig":
        """PEFT's LoraConfig of this method, but for `fields`."""
        own = {"r": self.rank, "lora_alpha": self.alpha, "use_rslora": self.rslora, "lora_dropout": self.dropout}
        merged = own | {"inference_mode": True} | fields
        if merged["lora_alpha"].is_integer():  # as PEFT writes it
            merged["lora_alpha"] = int(merged["lora_alpha"])
        config: PeftConfig = libraries.peft().LoraConfig(**merged)
        return config


def select(wanted: str | Sequence[str], layers: Sequence[str], key: str = "method.targets") -> tuple[str, ...]:
    """Those of `layers` that 'all-linear', 'attention' or a list of names means; `key` says which field holds it.

    Raises:
        ModelError: A name matches no layer.
    """
    if wanted == "all-linear":
        chosen = list(layers)
    elif wanted == "attention":
        chosen = [name for name in layers if any(_ATTENTION.search(part) for part in name.split("."))]
    else:
        ends = {name.rpartition(".")[2] for name in layers}
        for target in wanted:
            if not any(matches(name, target) for name in layers):
                raise ModelError(
                    f"{key}: no linear layer is called '{target}'{nearest(target, ends)}",
                    hint=f"This base has {', '.join(sorted(ends))}.",
                )
        chosen = [name for name in layers if any(matches(name, target) for target in wanted)]
    if wanted and not chosen:
        raise ModelError(f"{key}: this base has no linear layer for '{wanted}'")
    return tuple(chosen)


def matches(name: str, target: str) -> bool:
    """PEFT's rule: the whole name, or its last parts."""
    return name == target or name.endswith(f".{target}")
