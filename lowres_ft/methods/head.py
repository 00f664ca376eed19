"""Train nothing but the head: the cheapest baseline, and a check of what the base already knows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lowres_ft import libraries
from lowres_ft.methods.base import Method

if TYPE_CHECKING:
    from peft import PeftConfig

_NONE = "dummy-target-modules"  # PEFT's own name for no layer at all


class Head(Method):
    """The base stays as it is. Saved as LoRA on no layer, which any PEFT client reads."""

    kind: Literal["head"] = "head"
    head_only: ClassVar[bool] = True

    def peft_config(self, layers: Sequence[str], **border: Any) -> "PeftConfig":
        config: PeftConfig = libraries.peft().LoraConfig(inference_mode=True, **(border | {"target_modules": _NONE}))
        return config
