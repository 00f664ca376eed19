"""Train nothing but the head: the cheapest baseline, and a check of what the base already knows."""

from typing import TYPE_CHECKING, Any, Literal

from lowres_ft.methods.base import Method

if TYPE_CHECKING:
    from peft import PeftConfig


class Head(Method):
    """The base stays as it is. Saved as LoRA on no layer, which any PEFT client reads."""

    kind: Literal["head"] = "head"

    def peft_config(self, **border: Any) -> "PeftConfig":
        from peft import LoraConfig
        from peft.utils.constants import DUMMY_TARGET_MODULES

        return LoraConfig(inference_mode=True, **(border | {"target_modules": DUMMY_TARGET_MODULES}))
