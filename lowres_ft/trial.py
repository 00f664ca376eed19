"""A short measurement at the start of a run (`budget.probe`): its longest micro-batches and one batch of evaluation.

What would not fit shows here and not at step 120: memory that runs out makes the cut finer as it would in a step. The
memory and the seconds that were measured correct what was told. Nothing of it stays: gradients are dropped, no weight
is changed, and no random state is there to be moved.
"""

import math
import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from lowres_ft import batches, device, evaluate, pace, simulate, timings, train
from lowres_ft.batches import Tokens
from lowres_ft.budget import FEW_TOKENS
from lowres_ft.course import shapes
from lowres_ft.device import Machine
from lowres_ft.errors import ModelError, TrainingError
from lowres_ft.expectation import Expected
from lowres_ft.memory import Memory
from lowres_ft.model import Adapted
from lowres_ft.pace import Pace
from lowres_ft.plan import Plan
from lowres_ft.recipe import Recipe
from lowres_ft.train import TrainState

_SHARE = 0.02  # of a run's time that may go into timing it
_BRIEF = 3.0  # seconds that may in any case
_TIMES = 3  # of which the one in the middle counts
_APART = 1.5  # by which what was told of time may lie from what was measured
_FIRST = 1.5  # times what others take, that a process's first step may where it takes seconds
_FASTER = 0.9  # what a finer cut must take of the plan's, so that noise does not decide on the last bits of a result
_TOLD = 0.3  # for how much what was told of memory counts beside what was measured: by the squares of their errors
_NEAR = 0.1  # how far what was told may lie from what was measured
_STEPS = 32  # of which the one in the middle is timed


@dataclass(frozen=True)
class Trial:
    """What was measured before the first step, and what it says of the run."""

    memory_bytes: int
    """Peak of the run."""
    seconds: float
    """Of all training steps."""
    pace: Pace

    def to_json(self) -> dict[str, Any]:
        """What report.json says of it under `plan.probe`."""
        return {"memory_bytes": self.memory_bytes, "seconds": self.seconds}


@dataclass(frozen=True)
class _Subject:
    """What is tried."""

    recipe: Recipe
    adapted: Adapted
    tokens: Mapping[str, Tokens]
    machine: Machine
    state: TrainState
    """One of its own, which is thrown away."""

    def step(self, positions: np.ndarray, plan: Plan) -> float:
        """Seconds of a step's gradients over some sequences. One that is not finite is for the step to tell."""
        began = time.perf_counter()
        with suppress(TrainingError):
            return train.rehearse(self.state, self.tokens["train"], positions, plan, self.machine)
        return time.perf_counter() - began

    def shapes(self, positions: np.ndarray, plan: Plan) -> tuple[pace.Shape, ...]:
        """The micro-batches of a step in this process, as they are cut now."""
        most = self.state.cut or plan.micro_batch_tokens
        return shapes(self.tokens["train"], positions[:: plan.processes], most)

    def longest(self, plan: Plan) -> np.ndarray:
        """The longest sequences, as many as two micro-batches of a step hold."""
        lengths = self.tokens["train"].lengths
        most = min(self.recipe.train.batch_size, 2 * plan.processes * max(1, plan.micro_batch_tokens // lengths.max()))
        return np.argsort(-lengths, kind="stable")[:most]

    def typical(self) -> np.ndarray:
        """The sequences of a step that has about as many tokens as most."""
        tokens, spec = self.tokens["train"], self.recipe.train
        steps = [tokens.of_rows(rows) for rows in islice(batches.steps(tokens, spec.batch_size, spec.seed), _STEPS)]
        return sorted(steps, key=lambda step: int(tokens.lengths[step].sum()))[len(steps) // 2]


def choose(
    recipe: Recipe, adapted: Adapted, tokens: Mapping[str, Tokens], plan: Plan, machine: Machine, expected: Expected
) -> Plan:
    """The plan with the cut that is fastest here, where the run is long enough to find out; timed once and kept.

    Coarser cuts than the plan's are not tried: its memory was counted on. All processes take the first one's choice.
    """
    chosen = _chosen(_subject(recipe, adapted, tokens, plan, machine), plan, expected)
    return plan.model_copy(update={"micro_batch_tokens": int(device.same_for_all(machine, str(chosen)))})


def _chosen(subject: _Subject, plan: Plan, expected: Expected) -> int:
    """Tokens of the micro-batches by which a step takes least in this process."""
    recipe, tokens, machine = subject.recipe, subject.tokens, subject.machine
    step = subject.typical()
    cuts = [plan.micro_batch_tokens]
    while not plan.pinned_cut and cuts[-1] // 2 >= max(FEW_TOKENS, expected.course.width):
        cuts.append(cuts[-1] // 2)
    # A cut that leaves the step whole is the same as the plan's.
    cuts = [plan.micro_batch_tokens, *(most for most in cuts[1:] if len(shapes(tokens["train"], step, most)) > 1)]
    known = expected.seconds
    if len(cuts) == 1 or known is None or 3 * len(cuts) * known / expected.course.steps > _SHARE * known:
        return plan.micro_batch_tokens
    made = plan.model_dump(mode="json", exclude={"evaluation_tokens"})
    task, base, method = (part.model_dump(mode="json") for part in (recipe.task, recipe.model, recipe.method))
    what = f"cut {made} {task} {base} {method} {recipe.train.batch_size} {expected.course.typical}"
    return int(timings.once(machine, plan.dtype, what, lambda: _fastest(subject, step, plan, cuts)))


def _fastest(subject: _Subject, step: np.ndarray, plan: Plan, cuts: list[int]) -> int:
    """Tokens of the micro-batches by which a step takes least: the plan's, unless a finer cut is clearly faster."""
    taken: dict[int, list[float]] = {most: [] for most in cuts}
    for _ in range(3):
        for most, seconds in taken.items():
            seconds.append(subject.step(step, plan.model_copy(update={"micro_batch_tokens": most})))
    best = {most: min(seconds[1:]) for most, seconds in taken.items()}  # the first of each makes kernels ready
    worthy = [most for most in cuts[1:] if best[most] < _FASTER * best[cuts[0]]]
    return min(worthy, key=lambda most: best[most], default=cuts[0])


def run(
    recipe: Recipe, adapted: Adapted, tokens: Mapping[str, Tokens], plan: Plan, machine: Machine, expected: Expected
) -> Trial:
    """Take what needs most memory once, and time some steps as far as a run is worth it.

    Raises:
        OutOfMemoryError: One sequence alone does not fit.
    """
    subject = _subject(recipe, adapted, tokens, plan, machine)
    before = device.peak_bytes(plan.device)
    longest = subject.longest(plan)
    first = subject.step(longest, plan)
    _evaluated(adapted, tokens, plan)
    timed = _timed(subject, plan, expected, longest, first)
    after = device.peak_bytes(plan.device)
    found = (expected.pace or pace.UNKNOWN).corrected(timed)
    told = expected.memory
    peak = after + simulate.held(adapted, recipe).best if told is None else _peak(before, after, told)
    return Trial(peak, expected.course.training(found), found)


def _peak(before: int, after: int, told: Memory) -> int:
    """Bytes of a run at most, which had so many `before` its probe and `after` it; the optimizer's are among them.

    What was told, and what was measured with what comes later, err each in its own way: the peak is taken to lie
    between them, as near to each as its errors are small in runs that no constant was fitted to (`python -m
    benchmarks.fit` tells them). What was told of a model that is not known well counts for no more than 10 % beside.
    """
    if after == before:  # loading took more than the probe did, and hides what that took
        return max(before, min(told.total, before + (told.later or told.best)))
    if told.later is None:
        return max(after, told.total)
    measured = after + told.later
    near = min(max(told.total, (1 - _NEAR) * measured), (1 + _NEAR) * measured)
    return max(after, round(_TOLD * near + (1 - _TOLD) * measured))


def _between(seconds: float, told: float | None) -> float:
    """The middle of what was measured, in a moment in which a machine may be slow, and of what was told of it.

    What was told counts for no more than a factor beside.
    """
    if told is None:
        return seconds
    return math.sqrt(seconds * min(max(told, seconds / _APART), seconds * _APART))


def _timed(
    subject: _Subject, plan: Plan, expected: Expected, longest: np.ndarray, first: float
) -> list[tuple[tuple[pace.Shape, ...], float]]:
    """Micro-batches and their seconds, of a step in the middle and of the longest as far as there is time for them.

    The first step of a shape takes longer than others, as kernels and memory are made ready: so each is timed the
    second time. Where there is no time for that, what was told is bounded by `first`, which is the process's.
    """
    typical = subject.typical()
    parts = [subject.shapes(step, plan) for step in (longest, typical)]
    known = expected.pace
    told = [None if known is None else sum(map(known.seconds, part)) for part in parts]
    share = 1.0 if told[0] is None or told[1] is None else told[1] / told[0]
    most = max(_BRIEF, _SHARE * (expected.seconds or expected.course.steps * first))
    if 2 * first * share > most:
        again = first <= most
        return [(parts[0], _between(subject.step(longest, plan), told[0]) if again else _bounded(told[0], first, plan))]
    ends = time.perf_counter() + most
    subject.step(typical, plan)
    taken = [subject.step(typical, plan)]
    while len(taken) < _TIMES and time.perf_counter() + taken[-1] < ends:
        taken.append(subject.step(typical, plan))
    timed = [(parts[1], _between(statistics.median(taken), told[1]))]
    if sorted(parts[0]) != sorted(parts[1]) and time.perf_counter() + first < ends:
        timed.append((parts[0], _between(subject.step(longest, plan), told[0])))
    return timed


def _bounded(told: float | None, first: float, plan: Plan) -> float:
    """What was told of a step of which the first one took so long; a GPU's may take many times what others do."""
    least = first / _FIRST if plan.device == "cpu" and plan.offload == "none" else 0.0
    return first if told is None else min(max(told, least), first)


def _subject(recipe: Recipe, adapted: Adapted, tokens: Mapping[str, Tokens], plan: Plan, machine: Machine) -> _Subject:
    return _Subject(recipe, adapted, tokens, machine, train.start(recipe, adapted, tokens["train"], plan))


def _evaluated(adapted: Adapted, tokens: Mapping[str, Tokens], plan: Plan) -> None:
    """Compute one batch of the longest rows that are held out."""
    held = next((tokens[name] for name in ("validation", "test") if name in tokens), None)
    if held is not None:
        rows = np.argsort(-held.row_lengths, kind="stable")
        rows = rows[: max(1, plan.evaluation_tokens // int(held.lengths.max()))]
        with suppress(ModelError):  # what is not finite is for the evaluation to tell
            evaluate.outputs(adapted, batches.chosen(held, np.sort(rows)), plan)
