"""What a run has before it: how long its micro-batches are, and from that the time to its end."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

import numpy as np

from lowres_ft import batches, train
from lowres_ft.batches import Tokens, cut
from lowres_ft.pace import Pace, Shape
from lowres_ft.plan import Plan
from lowres_ft.recipe import Recipe
from lowres_ft.train import Step

_STEPS = 256  # of the first epochs, by which all are judged
_TRUST = 8  # steps that what was told counts for, beside those that were done


@dataclass(frozen=True)
class Course:
    """The steps and evaluations of a run."""

    steps: int
    every: int
    """Steps between evaluations; 0 where there is none."""
    sample: tuple[tuple[Shape, ...], ...]
    """Micro-batches of each of some steps."""
    tokens: float
    """Real tokens of a step."""
    evaluation: tuple[Shape, ...]
    """Batches of an evaluation."""
    held_out: float
    """How many evaluations all of the validation rows are, of which `evaluation` may hold a part."""
    width: int
    """Tokens of the longest sequence."""

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        plan: Plan,
        tokens: Mapping[str, Tokens],
        counts: Mapping[str, int] | None = None,
        width: int | None = None,
    ) -> "Course":
        """That of a recipe over tokenized rows, or over `counts` of rows whose lengths are like those of `tokens`."""
        spec, rows = recipe.train, tokens["train"]
        counts = counts or {name: len(split) for name, split in tokens.items()}
        total = train.total_steps(spec, counts["train"])
        drawn = list(islice(batches.steps(rows, spec.batch_size, spec.seed), min(total, _STEPS)))
        positions = [rows.of_rows(step) for step in drawn]
        sample = tuple(shapes(rows, step[:: plan.processes], plan.micro_batch_tokens) for step in positions)
        held = tokens.get("validation")
        every = spec.evaluate_every or batches.steps_per_epoch(counts["train"], spec.batch_size)
        return cls(
            steps=total,
            every=0 if held is None else every,
            sample=sample,
            tokens=fmean(float(rows.lengths[step].sum()) for step in positions),
            evaluation=() if held is None else shapes(held, np.arange(len(held.lengths)), plan.evaluation_tokens),
            held_out=0.0 if held is None else counts["validation"] / len(held),
            width=width or max(int(split.lengths.max()) for split in tokens.values()),
        )

    @property
    def micro_batches(self) -> list[Shape]:
        """Of all steps that were looked at, each shape once."""
        return sorted({shape for step in self.sample for shape in step})

    @property
    def typical(self) -> Shape:
        """The micro-batch in the middle, by its tokens."""
        every = sorted((shape for step in self.sample for shape in step), key=lambda shape: shape[0] * shape[1])
        return every[len(every) // 2]

    @property
    def goes_on(self) -> bool:
        """Whether steps come after an evaluation."""
        return 0 < self.every < self.steps

    def step(self, pace: Pace) -> float:
        """Seconds of a step."""
        return fmean(sum(map(pace.seconds, step)) for step in self.sample) + pace.update

    def training(self, pace: Pace) -> float:
        """Seconds of all steps, without evaluations."""
        return self.steps * self.step(pace)

    def evaluating(self, pace: Pace, done: int = 0) -> float:
        """Seconds of the evaluations after the first `done` steps."""
        if not self.every:
            return 0.0
        left = -(-self.steps // self.every) - done // self.every
        return left * self.held_out * sum(map(pace.of_evaluation, self.evaluation))


def shapes(tokens: Tokens, positions: np.ndarray, most_tokens: int) -> tuple[Shape, ...]:
    """The micro-batches that some sequences are cut into."""
    parts = cut(positions, tokens.lengths, most_tokens)
    return tuple((len(part), int(tokens.lengths[part].max())) for part in parts)


class Clock:
    """Time to finish: what was told, and more and more what the steps took."""

    def __init__(self, course: Course, pace: Pace | None) -> None:
        self.course = course
        self.pace = pace
        trust = 0 if pace is None else _TRUST
        self.seconds = 0.0 if pace is None else trust * course.step(pace)
        self.tokens = trust * course.tokens

    def left(self, step: Step) -> float:
        """Seconds to the end after a step, before it is evaluated; evaluations included where their pace is known."""
        self.seconds += step.seconds
        self.tokens += step.tokens
        each = self.seconds / max(1.0, self.tokens) * self.course.tokens
        steps = max(0, self.course.steps - step.number) * each
        if self.pace is None:
            return steps
        return steps + self.course.evaluating(self.pace, step.number - 1) * each / self.course.step(self.pace)
