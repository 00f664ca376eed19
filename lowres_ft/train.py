"""The one training loop: a generator of steps. Saving, logging and stopping live with whoever consumes it.

No random generator's state is part of a run. Order follows from (seed, epoch), an adapter's dropout from (seed, step,
example, module), and dropout inside the base from a seed that is set anew for each micro-batch: `TrainState` is all
that a step depends on beside the data.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from lowres_ft import limits, optimizers, shortage
from lowres_ft.attempt import Attempt
from lowres_ft.batches import Tokens, steps, steps_per_epoch
from lowres_ft.device import Machine
from lowres_ft.model import Adapted
from lowres_ft.parts import TrainSpec
from lowres_ft.plan import Plan
from lowres_ft.recipe import Recipe

_FIRST_LOSS_SCALE = 2.0**14


@dataclass(frozen=True)
class Step:
    """One optimizer step, done."""

    number: int
    """From 1."""
    loss: float
    """Mean over the step's supervised items."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    examples: int
    tokens: int
    """Real tokens, padding not counted."""
    seconds: float


class TrainState:
    """All that changes while training. `train` alone changes it; `state_dict` holds it whole."""

    def __init__(self, adapted: Adapted, spec: TrainSpec, total: int, plan: Plan) -> None:
        self.adapted = adapted
        self.spec = spec
        self.total = total
        self.step = 0
        self.loss_scale = _FIRST_LOSS_SCALE if plan.dtype == "float16" else 1.0
        self.steps_at_scale = 0
        self.best: dict[str, Tensor] | None = None
        self.best_metric = -math.inf
        self.best_step = 0
        self.waited = 0
        self.optimizer = optimizers.make(adapted, spec, plan)

    def record(self, metric: float) -> None:
        """Take note of an evaluation after the current step; keep the tensors if it is the best so far."""
        better = metric > self.best_metric if self.adapted.task.higher_is_better else metric < self.best_metric
        if better or self.best is None:
            shortage.twice(self._keep, str(self.adapted.device), "keeping the best step's tensors")
            self.best_metric, self.best_step, self.waited = metric, self.step, 0
        else:
            self.waited += 1

    def _keep(self) -> None:
        """Copy the best step's tensors over those of the one before: at no moment there are two copies."""
        if self.best is None:
            self.best = _cloned(self.adapted.tensors())
            return
        for name, tensor in self.adapted.tensors().items():
            self.best[name].copy_(tensor)

    @property
    def cut(self) -> int | None:
        """Tokens of a micro-batch, where memory ran out with as many as the plan says."""
        return self.adapted.room.training

    @cut.setter
    def cut(self, tokens: int | None) -> None:
        self.adapted.room.training = tokens

    @property
    def finished(self) -> bool:
        """True after the last step, or when early stopping says so."""
        stopping = self.spec.early_stopping
        return self.step >= self.total or (stopping is not None and self.waited >= stopping.patience)

    def restore_best(self) -> None:
        """Put the best step's tensors into the model, if there was an evaluation."""
        if self.best is not None:
            self.adapted.restore(self.best)

    def state_dict(self, *, copied: bool = True) -> dict[str, Any]:
        """Everything that the rest of a run depends on, in copies or as it lies here."""
        copy = _cloned if copied else dict
        return {
            "numbers": {name: getattr(self, name) for name in _NUMBERS},
            "tensors": copy(self.adapted.tensors()),
            "optimizer": copy(self.optimizer.state_dict()),
            "best": None if self.best is None else copy(self.best),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was called."""
        self.adapted.restore(state["tensors"])
        self.optimizer.load_state_dict(_cloned(state["optimizer"]))
        self.best = _cloned(state["best"])
        for name, value in state["numbers"].items():
            setattr(self, name, value)


_NUMBERS = ("step", "loss_scale", "steps_at_scale", "best_metric", "best_step", "waited", "cut")


def _cloned(value: Any) -> Any:
    """A copy of nested dicts and lists in which no tensor is shared."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _cloned(inner) for key, inner in value.items()}
    return [_cloned(inner) for inner in value] if isinstance(value, list) else value


def start(recipe: Recipe, adapted: Adapted, tokens: Tokens, plan: Plan) -> TrainState:
    """The state before the first step."""
    spec = recipe.train
    return TrainState(adapted, spec, total_steps(spec, len(tokens)), plan)


def total_steps(spec: TrainSpec, count: int) -> int:
    """Optimizer steps of a run over `count` rows."""
    return spec.steps or spec.epochs * steps_per_epoch(count, spec.batch_size)


def learning_rate(spec: TrainSpec, step: int, total: int) -> float:
    """The rate of a step (from 0): a linear rise over the warm-up's share, then the schedule down to 0."""
    warm = round(spec.warmup * total)
    if step < warm:
        return spec.learning_rate * (step + 1) / (warm + 1)
    done = (step - warm) / max(1, total - warm)
    factor = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[spec.schedule]
    return spec.learning_rate * factor


def train(state: TrainState, tokens: Tokens, plan: Plan, machine: Machine) -> Iterator[Step]:
    """Train from where `state` stands until it is finished, yielding each step after it is done.

    Raises:
        TrainingError: The loss or the gradient is not finite; the message names step, rate and rows.
        Stopped: A signal came; `state` stands after the last whole step.
    """
    spec = state.spec
    for rows in islice(steps(tokens, spec.batch_size, spec.seed), state.step, None):
        if state.finished:
            return
        positions = tokens.of_rows(rows)
        began = time.perf_counter()
        rate = learning_rate(spec, state.step, state.total)
        loss, norm = _step(Attempt(state, tokens, positions, plan, machine, rate))
        state.step += 1
        yield Step(
            number=state.step,
            loss=loss,
            learning_rate=rate,
            gradient_norm=norm,
            examples=len(rows),
            tokens=int(tokens.lengths[positions].sum()),
            seconds=time.perf_counter() - began,
        )


def rehearse(state: TrainState, tokens: Tokens, positions: np.ndarray, plan: Plan, machine: Machine) -> float:
    """Take the gradient of this process's share of a step, and drop it; smaller micro-batches where memory runs out.

    Nothing is exchanged, as other processes may rehearse more or less often. One without a share takes a sequence.

    Returns:
        The seconds that it took, the last time.

    Raises:
        OutOfMemoryError: Each sequence passed on its own already, or the plan's cut has to stay.
        TrainingError: The loss or the gradient is not finite.
    """
    scale = state.loss_scale, state.steps_at_scale
    mine = positions[machine.rank :: machine.processes]
    mine = mine if len(mine) else positions[:1]
    alone = replace(machine, processes=1, rank=0)
    while True:
        attempt = Attempt(state, tokens, mine, plan, alone, rate=0.0)
        began = time.perf_counter()
        try:
            limits.apart(attempt.gradient)
            return time.perf_counter() - began
        except Exception as error:
            if not shortage.ran_out(error):
                raise
            said = shortage.said(error)
        finally:
            state.optimizer.zero_grad(set_to_none=True)
            state.loss_scale, state.steps_at_scale = scale
        attempt.cut_finer(said)


def _step(attempt: Attempt) -> tuple[float, float]:
    """Take a step, and again where memory runs out.

    Returns:
        The loss, and the gradient's norm before clipping.
    """
    while True:
        try:
            return limits.apart(attempt.take)
        except Exception as error:
            if not shortage.ran_out(error):
                raise
            said = shortage.said(error)
        attempt.relieve(said)
