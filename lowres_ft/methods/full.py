"""Plain fine-tuning of every weight: the baseline that adapters are measured against."""

from typing import ClassVar, Literal

from lowres_ft.methods.base import Method


class Full(Method):
    """Every weight is trained in fp32. The bundle is a whole transformers model."""

    kind: Literal["full"] = "full"
    trains_base: ClassVar[bool] = True

    def conflict(self, quantize: str) -> str | None:
        if quantize == "none":
            return None
        return f"full trains every weight, and {quantize} weights cannot be trained; use model.quantize=none or lora"
