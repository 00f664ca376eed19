"""Tasks whose answers have probabilities, which a temperature makes right as often as they say."""

from collections.abc import Callable
from typing import Any, Self

from pydantic import Field, ValidationInfo, field_validator

from lowres_ft import calibration
from lowres_ft.tasks.base import Ragged, Task


class Calibrated(Task):
    """A task whose logits are divided by a temperature before they become probabilities."""

    calibrate: bool = True
    """Fit a temperature on validation after training, so that answers given with probability 0.8 are right in 80 %."""
    temperature: float | None = Field(default=None, gt=0)
    """What logits are divided by before they become probabilities; null for what is fitted, else 1."""

    @field_validator("temperature")
    @classmethod
    def _wanted(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and not info.data.get("calibrate", True):
            raise ValueError("is for task.calibrate=true")
        return value

    @property
    def divisor(self) -> float:
        """The temperature, 1 where there is none."""
        return self.temperature or 1.0

    @property
    def advice(self) -> str:
        if self.temperature is None:
            return ""
        return (
            f"Divide logits by {self.temperature:g}, a temperature that was chosen on validation, before they become "
            "probabilities: without it, these are not calibrated."
        )

    def uncalibrated(self) -> Self:
        return self.model_copy(update={"temperature": None})

    def fitted(self, truth: Ragged, outputs: Ragged) -> Self:
        """The task with the temperature that fits these rows; as it is where one is given, or none is wanted."""
        if not self.calibrate or self.temperature is not None:
            return self
        logits = outputs.values
        lead = abs(logits) if logits.shape[1] == 1 else logits.max(1) - logits.min(1)
        found = calibration.temperature(self._mean_loss(truth, outputs), float(lead.max()))
        return self if found is None else self.model_copy(update={"temperature": found})

    def _mean_loss(self, truth: Ragged, outputs: Ragged) -> Callable[[float], float]:
        """The mean negative log-likelihood of the items by temperature."""

        def mean_loss(temperature: float) -> float:
            found = self.model_copy(update={"temperature": temperature}).certainty(truth, outputs)
            assert found is not None
            return float(-found[:, 2].mean())

        return mean_loss
