"""Predictions and their scores: intervals by bootstrap, and simple baselines beside them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lowres_ft.batches import Tokens, collate, cut
from lowres_ft.data import Rows
from lowres_ft.errors import ModelError
from lowres_ft.model import Adapted
from lowres_ft.plan import Plan
from lowres_ft.spec import Spec
from lowres_ft.tasks.base import Task

_RESAMPLES = 1000
_SEED = 20_090  # of the bootstrap alone, so that the same predictions always get the same interval


class Value(Spec):
    """A score with its 95 % bootstrap interval over `count` rows."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Scores:
    """Metrics by name, and what a report shows beside them."""

    metrics: Mapping[str, Value]
    details: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Each metric as value, low, high and count, then the details."""
        return {name: value.model_dump() for name, value in self.metrics.items()} | dict(self.details)


def outputs(adapted: Adapted, tokens: Tokens, plan: Plan) -> np.ndarray:
    """(N, ...) fp32 outputs of the model on a split, in its order."""
    found: list[np.ndarray | None] = [None] * len(tokens)
    was_training = adapted.model.training
    adapted.model.eval()
    try:
        for part in cut(np.arange(len(tokens)), tokens.lengths, plan.evaluation_tokens):
            batch = collate(tokens, part, adapted)
            with torch.inference_mode(), adapted.computing():
                result = adapted.task.outputs(adapted.model, batch).float().cpu().numpy()
            for position, output in zip(part, result, strict=True):
                found[position] = output
    finally:
        adapted.model.train(was_training)
    stacked = np.stack([output for output in found if output is not None])
    if not np.isfinite(stacked).all():
        first = tokens.where(np.flatnonzero(~np.isfinite(stacked.reshape(len(stacked), -1)).all(1))[:1])[0]
        raise ModelError(f"the model's output is not a finite number, first for {first}", hint="Try --dtype float32.")
    return stacked


def targets(tokens: Tokens) -> np.ndarray:
    """(N,) targets of a split with one target a sequence."""
    return np.asarray(tokens.targets, dtype=np.int64)


def score(task: Task, truth: np.ndarray, predicted: np.ndarray) -> Scores:
    """Metrics of outputs against targets, each with the 2.5 and 97.5 percentiles over resampled rows."""
    evidence = task.evidence(truth, predicted)
    values = task.metrics(evidence)
    resampled = [task.metrics(evidence[index]) for index in _resamples(len(truth))]
    metrics = {
        name: Value(value=value, count=len(truth), **_interval([sample[name] for sample in resampled]))
        for name, value in values.items()
    }
    return Scores(metrics, task.details(evidence))


def difference(task: Task, truth: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> Value:
    """How much better ours is on the task's first metric, with a paired interval: the same rows drawn for both."""
    pair = [task.evidence(truth, outputs) for outputs in (ours, theirs)]

    def gain(index: np.ndarray) -> float:
        better, worse = (task.metrics(evidence[index])[task.metric] for evidence in pair)
        return better - worse

    samples = [gain(index) for index in _resamples(len(truth))]
    return Value(value=gain(np.arange(len(truth))), count=len(truth), **_interval(samples))


def metric(task: Task, truth: np.ndarray, predicted: np.ndarray) -> float:
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


def baselines(
    task: Task, train: Rows, test: Rows, truth: np.ndarray, ours: np.ndarray, seed: int
) -> dict[str, Baseline]:
    """Train the task's baselines on the same rows and compare."""
    found = task.baselines(train.examples(task), test.examples(task), seed)
    return {
        name: Baseline(score(task, truth, theirs), difference(task, truth, ours, theirs))
        for name, theirs in found.items()
    }
