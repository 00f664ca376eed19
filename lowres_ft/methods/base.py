"""What a fine-tuning method is: its fields in a recipe, and what it says about a model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lowres_ft.spec import Spec

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class LowRank:
    """The update scaling * B A of a linear layer, A (rank, inputs) and B (outputs, rank)."""

    rank: int
    scaling: float
    dropout: float


class Method(Spec):
    """A fine-tuning method. Its fields are its part of the recipe."""

    kind: str
    """Name of the method's file."""
    trains_base: ClassVar[bool] = False
    """True when every weight is trained and the bundle holds a whole model; else it holds an adapter."""

    def conflict(self, quantize: str) -> str | None:
        """Why this method cannot work on a base held as `quantize`; None when it can."""
        return None

    def wanted(self) -> str | tuple[str, ...]:
        """The layers to adapt: 'all-linear', 'attention', or names; an empty tuple adapts none."""
        return ()

    def low_rank(self) -> "LowRank | None":
        """The adapter that each wanted layer gets; None where nothing is added."""
        return None

    def peft_config(self, **border: Any) -> "PeftConfig":
        """The configuration that PEFT reads.

        `border` holds what the method does not know: base_model_name_or_path, revision, task_type,
        target_modules (those adapted), modules_to_save (heads) and fan_in_fan_out (GPT-2's linear layers).
        """
        raise NotImplementedError(f"{self.kind} is not saved as an adapter")


PLUGIN = Method
