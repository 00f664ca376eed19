"""The one training loop: a generator of steps. Saving, logging and stopping live with whoever consumes it.

No random generator's state is part of a run. Order follows from (seed, epoch), an adapter's dropout from (seed, step,
example, module), and dropout inside the base from a seed that is set anew for each micro-batch: `TrainState` is all
that a step depends on beside the data.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowres_ft import limits, optimizers, shortage, stopping
from lowres_ft.batches import Tokens, cut, steps, steps_per_epoch
from lowres_ft.device import Machine, sum_over_processes
from lowres_ft.errors import OutOfMemoryError, TrainingError
from lowres_ft.model import Adapted
from lowres_ft.packing import micro_batches
from lowres_ft.plan import Plan
from lowres_ft.recipe import Recipe, TrainSpec
from lowres_ft.tasks.base import Batch

_FIRST_LOSS_SCALE = 2.0**14
_SCALE_GROWS_AFTER = 1000  # steps without an overflow


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
            self.best = {name: tensor.clone() for name, tensor in self.adapted.tensors().items()}
            self.best_metric, self.best_step, self.waited = metric, self.step, 0
        else:
            self.waited += 1

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
            "best": None if self.best is None else dict(self.best),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was called."""
        self.adapted.restore(state["tensors"])
        self.optimizer.load_state_dict(_cloned(state["optimizer"]))
        self.best = None if state["best"] is None else dict(state["best"])
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
        loss, norm = _step(state, tokens, positions, plan, machine, rate)
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
    """Take the gradient of a step, and drop it; where memory runs out, from its beginning in smaller micro-batches.

    Returns:
        The seconds that it took, the last time.

    Raises:
        OutOfMemoryError: Each sequence passed on its own already, or the plan's cut has to stay.
        TrainingError: The loss is not finite.
    """
    scale = state.loss_scale, state.steps_at_scale
    while True:
        began = time.perf_counter()
        try:
            limits.apart(partial(_gradients, state, tokens, positions, plan, machine, rate=0.0))
            return time.perf_counter() - began
        except Exception as error:
            if not shortage.ran_out(error):
                raise
        finally:
            state.optimizer.zero_grad(set_to_none=True)
            state.loss_scale, state.steps_at_scale = scale
        _relieve(state, tokens, positions[machine.rank :: machine.processes], plan)


def _step(
    state: TrainState, tokens: Tokens, positions: np.ndarray, plan: Plan, machine: Machine, rate: float
) -> tuple[float, float]:
    """Take a step; where memory runs out, from its beginning again in smaller micro-batches.

    Returns:
        The loss, and the gradient's norm before clipping.
    """
    mine = positions[machine.rank :: machine.processes]
    while True:
        try:
            return limits.apart(partial(_taken, state, tokens, positions, plan, machine, rate))
        except Exception as error:
            if not shortage.ran_out(error):
                raise
        _relieve(state, tokens, mine, plan)


def _taken(
    state: TrainState, tokens: Tokens, positions: np.ndarray, plan: Plan, machine: Machine, rate: float
) -> tuple[float, float]:
    """The loss and the gradient's norm of a step that is taken once."""
    loss = _gradients(state, tokens, positions, plan, machine, rate)
    return loss, _update(state, rate, tokens, positions)


def _relieve(state: TrainState, tokens: Tokens, mine: np.ndarray, plan: Plan) -> None:
    """Drop what a step had made before memory ran out, and let its largest micro-batch be half as large.

    Raises:
        OutOfMemoryError: Each sequence passed on its own already, or the plan's cut has to stay.
    """
    state.optimizer.zero_grad(set_to_none=True)
    optimizers.rewind(state.optimizer, state.step)
    shortage.release(plan.device)
    if plan.pinned_cut:
        why = "dropout inside the base ties the result to its micro-batches, so that they cannot be made smaller"
        raise OutOfMemoryError(f"memory ran out: step {state.step + 1}; {why}", hint="Use model.dropout=0.")
    parts = list(cut(mine, tokens.lengths, state.cut or plan.micro_batch_tokens))
    several = [len(part) * int(tokens.lengths[part].max()) for part in parts if len(part) > 1]
    if not several:
        where = tokens.where(parts[0][:1])[0]
        longest = int(tokens.lengths[mine].max())
        raise OutOfMemoryError(
            f"memory ran out: step {state.step + 1}, one text at a time, of which {where} has {longest:,} tokens"
        )
    state.adapted.room.shrink_training(max(several) // 2, state.step + 1)


def _gradients(
    state: TrainState, tokens: Tokens, positions: np.ndarray, plan: Plan, machine: Machine, rate: float
) -> float:
    """Leave the step's gradient in the parameters; return its loss.

    In fp16 a step whose gradient overflows is done again at half the loss scale, not skipped.
    """
    parameters = list(state.adapted.trained().values())
    targets = np.concatenate([tokens.target(position) for position in positions])
    count = state.adapted.task.counted(targets) or 1.0
    mine = positions[machine.rank :: machine.processes]
    while True:
        state.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), dtype=torch.float64)  # on the processor: MPS has no float64
        for part, batch in micro_batches(mine, tokens, _cut_plan(state, plan), state.adapted):
            summed = _backward(state, batch, state.loss_scale / count)
            if not math.isfinite(summed):
                raise _not_finite("loss", state.step, rate, tokens.where(part))
            loss += summed / count
            stopping.check()  # a step that is half done is dropped
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        if machine.processes > 1:
            sum_over_processes([*gradients, loss])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if plan.dtype != "float16" or _fits(state, gradients):
            return float(loss)


def _cut_plan(state: TrainState, plan: Plan) -> Plan:
    """The plan, with micro-batches as small as memory turned out to ask for."""
    return plan if state.cut is None else plan.model_copy(update={"micro_batch_tokens": state.cut})


def _backward(state: TrainState, batch: Batch, scale: float) -> float:
    """Add the gradient of a micro-batch's summed loss times `scale`; return that sum."""
    adapted = state.adapted
    if adapted.model.training:  # dropout inside the base draws from here, whatever was drawn before
        torch.manual_seed(hash((state.spec.seed, state.step, int(batch.rows.flatten()[0]))))
    adapted.keys.set(state.step, batch.rows, batch.ids.shape[1], batch.places)
    try:
        with adapted.computing():
            loss = adapted.task.loss(adapted.model, batch)
        (loss * scale).backward()  # type: ignore[no-untyped-call]
    finally:
        adapted.keys.clear()
    return float(loss.detach())


def _fits(state: TrainState, gradients: list[Tensor]) -> bool:
    """Take the loss scale out of fp16 gradients; if they overflowed, halve it and return False."""
    if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
        for gradient in gradients:
            gradient.div_(state.loss_scale)
        state.steps_at_scale += 1
        if state.steps_at_scale == _SCALE_GROWS_AFTER:
            state.loss_scale, state.steps_at_scale = state.loss_scale * 2, 0
        return True
    if state.loss_scale < 2.0**-10:
        raise TrainingError(
            f"step {state.step + 1}: the gradient overflows fp16 at any loss scale", hint=_NOT_FINITE_HINT
        )
    state.loss_scale, state.steps_at_scale = state.loss_scale / 2, 0
    return False


def _update(state: TrainState, rate: float, tokens: Tokens, positions: np.ndarray) -> float:
    """Clip the gradient and take the optimizer's step; return the norm before clipping."""
    parameters = list(state.adapted.trained().values())
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, state.spec.clip or math.inf))
    if not math.isfinite(norm):
        raise _not_finite("gradient", state.step, rate, tokens.where(positions))
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["rate"]
    state.optimizer.step()
    return norm


_NOT_FINITE_HINT = "Lower train.learning_rate, or use model.dtype=float32."
_AT_ONCE_HINT = "Nothing was learned yet: the base's weights are at fault, or model.dtype=float32 is needed."


def _not_finite(what: str, step: int, rate: float, rows: list[str]) -> TrainingError:
    shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    told = f"step {step + 1}: the {what} is not finite (learning rate {rate:g}; rows {shown})"
    return TrainingError(told, hint=_NOT_FINITE_HINT if step else _AT_ONCE_HINT)
