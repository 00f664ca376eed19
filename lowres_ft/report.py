"""report.json: what was planned and what was measured. Other programs rely on its keys."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from lowres_ft import device
from lowres_ft.device import versions
from lowres_ft.evaluate import Baseline, Scores
from lowres_ft.model import Adapted
from lowres_ft.plan import Plan
from lowres_ft.recipe import Recipe
from lowres_ft.train import Step

_POINTS = 200  # of a curve of losses


@dataclass(frozen=True)
class Measured:
    """What a run took."""

    train_seconds: float
    """Steps alone, evaluations not counted."""
    examples: int
    tokens: int
    """Real tokens that were trained on, padding not counted."""
    steps: int
    best_step: int
    peak_bytes: int
    losses: tuple[float, ...]
    """Of each step."""
    evaluations: tuple[tuple[int, float], ...]
    """Steps and the first metric on validation after them."""
    resumed: int = 0
    """How often the run went on after it was interrupted; steps and evaluations are those of all its parts."""

    @classmethod
    def of(
        cls, steps: Sequence[Step], evaluations: Sequence[tuple[int, float]], best_step: int, device_name: str
    ) -> Self:
        """Sum up some steps, the best of which was `best_step` (0 where none was evaluated)."""
        return cls(
            train_seconds=sum(step.seconds for step in steps),
            examples=sum(step.examples for step in steps),
            tokens=sum(step.tokens for step in steps),
            steps=len(steps),
            best_step=best_step or len(steps),
            peak_bytes=device.peak_bytes(device_name),
            losses=tuple(step.loss for step in steps),
            evaluations=tuple(evaluations),
        )

    def to_json(self) -> dict[str, Any]:
        """The figures, with rates per second of training."""
        seconds = max(self.train_seconds, 1e-9)
        return {
            "train_seconds": self.train_seconds,
            "examples_per_second": self.examples / seconds,
            "tokens_per_second": self.tokens / seconds,
            "tokens": self.tokens,
            "steps": self.steps,
            "best_step": self.best_step,
            "peak_bytes": self.peak_bytes,
            "resumed": self.resumed,
        }

    def curves(self) -> dict[str, Any]:
        """Pairs of a step and its value: losses, their means over as many steps as leave 200, and evaluations."""
        span = -(-len(self.losses) // _POINTS)
        parts = [self.losses[at : at + span] for at in range(0, len(self.losses), span)]
        ends = [min(len(self.losses), (number + 1) * span) for number in range(len(parts))]
        losses = [[end, sum(part) / len(part)] for end, part in zip(ends, parts, strict=True)]
        return {"loss": losses, "validation": [list(pair) for pair in self.evaluations]}


def make(
    recipe: Recipe,
    plan: Plan,
    adapted: Adapted,
    measured: Measured,
    scores: Mapping[str, Scores],
    baselines: Mapping[str, Baseline],
    notes: Sequence[str],
    expected: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of report.json, but for `adapter_bytes`, which is known once the adapter is written.

    `expected` says what the plan was expected to take.
    """
    trained = sum(parameter.numel() for parameter in adapted.trained().values())
    return {
        "recipe": recipe.model_dump(mode="json"),
        "plan": plan.model_dump(mode="json") | dict(expected),
        "measured": measured.to_json(),
        "curves": measured.curves(),
        "trainable_parameters": trained,
        "parameters": adapted.parameters,
        "scores": {split: found.to_json() for split, found in scores.items()},
        "baselines": {name: baseline.to_json() for name, baseline in baselines.items()},
        "notes": list(notes),
        "versions": versions(),
    }
