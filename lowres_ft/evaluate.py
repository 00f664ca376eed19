"""Predictions and their scores: intervals by bootstrap, and simple baselines beside them."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from lowres_ft import allocator, forked, limits, shortage
from lowres_ft.batches import Tokens, collate, cut
from lowres_ft.data import Rows
from lowres_ft.errors import ModelError
from lowres_ft.model import Adapted
from lowres_ft.plan import Plan
from lowres_ft.spec import Spec, figures
from lowres_ft.tasks.base import Batch, Ragged, Task, supervised

_RESAMPLES = 1000
_SEED = 20_090  # of the bootstrap alone, so that the same predictions always get the same interval


class Value(Spec):
    """A score with its 95 % bootstrap interval over `count` rows."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        value, low, high = figures(self.value, self.low, self.high)
        return f"{value} [{low}, {high}]"


@dataclass(frozen=True)
class Scores:
    """Metrics by name, and what a report shows beside them."""

    metrics: Mapping[str, Value]
    details: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Each metric as value, low, high and count, then the details."""
        return {name: value.model_dump() for name, value in self.metrics.items()} | dict(self.details)


def outputs(adapted: Adapted, tokens: Tokens, plan: Plan) -> Ragged:
    """The model's fp32 outputs for the items of each row, (items, W) in all."""
    found: list[np.ndarray] = [np.empty(0)] * len(tokens.lengths)
    for part, values in _batches(adapted, tokens, plan, adapted.task.outputs):
        for position, value in zip(part, values, strict=True):
            items = supervised(tokens.target(position))
            found[position] = value[: len(items)][items]
    rows = [np.concatenate(found[first:last]) for first, last in itertools.pairwise(tokens.firsts)]
    return Ragged.of(rows)


def logits(adapted: Adapted, tokens: Tokens, plan: Plan, *, most: int | None = None) -> np.ndarray:
    """The model's fp32 logits for a split, (sequences, ...); shorter ones are filled with 0.

    Of a split with more than `most` logits (those of a vocabulary are many) the longest sequences are taken, which are
    the same for every model.
    """
    found: dict[int, np.ndarray] = {}
    room = 0  # sequences as long as the longest one, which comes first
    for part, values in _batches(adapted, tokens, plan, adapted.task.logits):
        room = room or (len(tokens.lengths) if most is None else max(1, most // values[0].size))
        found |= itertools.islice(zip(part.tolist(), values, strict=True), room - len(found))
        if len(found) == room:
            break
    longest = max(len(value) for value in found.values())
    ordered = (value for _, value in sorted(found.items()))
    return np.stack([np.pad(v, [(0, longest - len(v)), *[(0, 0)] * (v.ndim - 1)]) for v in ordered])


def _batches(
    adapted: Adapted, tokens: Tokens, plan: Plan, compute: Callable[[PreTrainedModel, Batch], torch.Tensor]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield positions of sequences and what `compute` gives for them, (B, ...), with dropout off."""
    was_training = adapted.model.training
    adapted.model.eval()
    most = adapted.room.evaluation or plan.evaluation_tokens
    waiting = deque(cut(np.arange(len(tokens.lengths)), tokens.lengths, most))
    try:
        while waiting:
            part = waiting.popleft()
            try:
                values = limits.apart(partial(_values, adapted, tokens, part, compute))
            except Exception as error:
                if not shortage.ran_out(error):
                    raise
                said = shortage.said(error)
            else:
                yield part, values
                allocator.tidy()
                continue
            most = _smaller(adapted, tokens, part, plan, said)
            waiting = deque(cut(np.concatenate([part, *waiting]), tokens.lengths, most))
    finally:
        adapted.model.train(was_training)


def _values(
    adapted: Adapted, tokens: Tokens, part: np.ndarray, compute: Callable[[PreTrainedModel, Batch], torch.Tensor]
) -> np.ndarray:
    """What `compute` gives for some sequences, (B, ...).

    Raises:
        ModelError: It is not finite.
    """
    batch = collate(tokens, part, adapted)
    with torch.inference_mode(), adapted.computing():
        values: np.ndarray = compute(adapted.model, batch).float().cpu().numpy()
    if not np.isfinite(values).all():
        wrong = ~np.isfinite(values.reshape(len(values), -1)).all(1)
        first = tokens.where(part[wrong])[0]
        raise ModelError(f"the model's output is not a finite number, first for {first}", hint="Try --dtype float32.")
    return values


def _smaller(adapted: Adapted, tokens: Tokens, part: np.ndarray, plan: Plan, said: str) -> int:
    """Tokens of a batch from now on: half of one that did not fit.

    Raises:
        OutOfMemoryError: It was one sequence.
    """
    shortage.release(plan.device)
    width = int(tokens.lengths[part].max())
    if len(part) == 1:
        raise shortage.exhausted(f"evaluating {tokens.where(part)[0]}, {width:,} tokens, on its own", said)
    adapted.room.shrink_evaluation(most := len(part) * width // 2)
    return most


@dataclass(frozen=True)
class _Sampled:
    """Metrics of some rows, and of each of their resamples, which are the same for all evidence of as many rows."""

    task: Task
    evidence: np.ndarray
    values: Mapping[str, float]
    samples: list[dict[str, float]]

    @classmethod
    def of(cls, task: Task, evidence: np.ndarray) -> "_Sampled":
        samples = [task.metrics(evidence[index]) for index in _resamples(len(evidence))]
        return cls(task, evidence, task.metrics(evidence), samples)

    def scores(self) -> Scores:
        """Each metric with its interval."""
        metrics = {
            name: Value(value=value, count=len(self.evidence), **_interval([sample[name] for sample in self.samples]))
            for name, value in self.values.items()
        }
        return Scores(metrics, self.task.details(self.evidence))

    def gains(self, theirs: "_Sampled") -> tuple[Value, list[float]]:
        """How much better this is than theirs on the task's first metric."""
        name = self.task.metric
        higher, lower = (self, theirs) if self.task.higher_is_better else (theirs, self)
        samples = [one[name] - other[name] for one, other in zip(higher.samples, lower.samples, strict=True)]
        value = higher.values[name] - lower.values[name]
        return Value(value=value, count=len(self.evidence), **_interval(samples)), samples


def score(task: Task, truth: Ragged, predicted: Ragged) -> Scores:
    """Metrics of outputs against targets, each with the 2.5 and 97.5 percentiles over resampled rows."""
    return _Sampled.of(task, task.evidence(truth, predicted)).scores()


def difference(task: Task, truth: Ragged, ours: Ragged, theirs: Ragged) -> Value:
    """How much better ours is on the task's first metric, with a paired interval: the same rows drawn for both."""
    return gains(task, task.evidence(truth, ours), task.evidence(truth, theirs))[0]


def gains(task: Task, ours: np.ndarray, theirs: np.ndarray) -> tuple[Value, list[float]]:
    """How much better one evidence of some rows is than another, and the resamples that the interval is of."""
    return _Sampled.of(task, ours).gains(_Sampled.of(task, theirs))


def metric(task: Task, truth: Ragged, predicted: Ragged) -> float:
    """The task's first metric of outputs against targets."""
    return task.metrics(task.evidence(truth, predicted))[task.metric]


def _resamples(count: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(_SEED)
    for _ in range(_RESAMPLES):
        yield random.integers(0, count, count)


def _interval(samples: list[float]) -> dict[str, float]:
    low, high = np.percentile(samples, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}


@dataclass(frozen=True)
class Baseline:
    """A simple model's scores on the same test rows, and how much better ours is."""

    scores: Scores
    gain: Value

    def to_json(self) -> dict[str, Any]:
        """The scores, and the gain under 'gain'."""
        return self.scores.to_json() | {"gain": self.gain.model_dump()}


def baseline(task: Task, truth: Ragged, ours: Ragged, theirs: Ragged) -> Baseline:
    """Score the outputs of a simple model, and compare ours with them."""
    return _beside(_Sampled.of(task, task.evidence(truth, ours)), task.evidence(truth, theirs))


def _beside(ours: _Sampled, theirs: np.ndarray) -> Baseline:
    other = _Sampled.of(ours.task, theirs)
    return Baseline(other.scores(), ours.gains(other)[0])


def baselines(task: Task, train: Rows, test: Tokens, ours: Ragged, seed: int) -> dict[str, Baseline]:
    """Train the task's baselines on the same rows and compare.

    Raises:
        NoRoomError: A bound of this process, or a limit of the system, leaves too little for them.
    """
    rows = test.rows
    assert rows is not None
    examples = train.examples(task), rows.examples(task)
    found: dict[str, Ragged] = forked.result(
        lambda: task.baselines(*examples, seed), brings=forked.SCIKIT_LEARN, room=limits.room_beside()
    )
    if not found:
        return {}
    own = _Sampled.of(task, task.evidence(test.truth, ours))
    return {name: _beside(own, task.evidence(test.truth, theirs)) for name, theirs in found.items()}
