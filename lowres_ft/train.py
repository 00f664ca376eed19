"""The one training loop: a generator of steps. Saving, logging and stopping live with whoever consumes it.

No random generator's state is part of a run. Order follows from (seed, epoch), an adapter's dropout from (seed, step,
example, module), and dropout inside the base from a seed that is set anew for each micro-batch: `TrainState` is all
that a step depends on beside the data.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowres_ft import libraries, stopping
from lowres_ft.batches import Tokens, steps, steps_per_epoch
from lowres_ft.device import Machine, sum_over_processes
from lowres_ft.errors import TrainingError
from lowres_ft.model import Adapted
from lowres_ft.packing import micro_batches
from lowres_ft.plan import Plan
from lowres_ft.recipe import Recipe, TrainSpec
from lowres_ft.tasks.base import Batch

_FIRST_LOSS_SCALE = 2.0**14
_SCALE_GROWS_AFTER = 1000  # steps without an overflow
_BETAS = (0.9, 0.999)


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
        self.optimizer = _optimizer(adapted, spec, plan)

    def record(self, metric: float) -> None:
        """Take note of an evaluation after the current step; keep the tensors if it is the best so far."""
        better = metric > self.best_metric if self.adapted.task.higher_is_better else metric < self.best_metric
        if better or self.best is None:
            self.best = {name: tensor.clone() for name, tensor in self.adapted.tensors().items()}
            self.best_metric, self.best_step, self.waited = metric, self.step, 0
        else:
            self.waited += 1

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


def require_optimizer(spec: TrainSpec, device: str) -> None:
    """Refuse, before a weight is read, an optimizer that a device cannot run.

    Raises:
        TrainingError: bitsandbytes is not there, or has no such optimizer for it.
    """
    if spec.optimizer == "adamw":
        return
    kind, why = torch.device(device).type, "which is not installed"
    try:
        libraries.bitsandbytes()
        why = f"whose version {metadata.version('bitsandbytes')} does not have it for {kind}"
        known = torch._C._dispatch_has_kernel_for_dispatch_key(_KERNEL, kind.upper())  # noqa: SLF001
    except (ImportError, RuntimeError):
        known = False
    if not known:
        told = f"train.optimizer={spec.optimizer} needs bitsandbytes, {why}"
        raise TrainingError(told, hint="Use train.optimizer=adamw.")


_KERNEL = "bitsandbytes::optimizer_update_8bit_blockwise"


def _optimizer(adapted: Adapted, spec: TrainSpec, plan: Plan) -> torch.optim.Optimizer:
    groups = _groups(adapted, spec)
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=_BETAS, fused=plan.fused_optimizer)
    found: torch.optim.Optimizer = libraries.bitsandbytes().optim.AdamW8bit(groups, lr=0.0, betas=_BETAS)
    return found


def _groups(adapted: Adapted, spec: TrainSpec) -> list[dict[str, Any]]:
    """The trained parameters by weight decay, which is for matrices alone, and by their rate over the recipe's."""
    groups: dict[tuple[bool, float], list[Tensor]] = {}
    for name, parameter in adapted.trained().items():
        vector = max(parameter.shape) == parameter.numel()
        groups.setdefault((vector, adapted.method.rate(name)), []).append(parameter)
    return [
        {"params": groups[vector, rate], "weight_decay": 0.0 if vector else spec.weight_decay, "rate": rate}
        for vector, rate in sorted(groups)
    ]


_NUMBERS = ("step", "loss_scale", "steps_at_scale", "best_metric", "best_step", "waited")


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
        loss = _gradients(state, tokens, positions, plan, machine, rate)
        norm = _update(state, rate, tokens, positions)
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
        for part, batch in micro_batches(mine, tokens, plan, state.adapted):
            summed = _backward(state, batch, state.loss_scale / count)
            if not math.isfinite(summed):
                raise TrainingError(_not_finite("loss", state.step, rate, tokens.where(part)), hint=_NOT_FINITE_HINT)
            loss += summed / count
            stopping.check()  # a step that is half done is dropped
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        if machine.processes > 1:
            sum_over_processes([*gradients, loss])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if plan.dtype != "float16" or _fits(state, gradients):
            return float(loss)


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
        raise TrainingError(_not_finite("gradient", state.step, rate, tokens.where(positions)), hint=_NOT_FINITE_HINT)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["rate"]
    state.optimizer.step()
    return norm


_NOT_FINITE_HINT = "Lower train.learning_rate, or use model.dtype=float32."


def _not_finite(what: str, step: int, rate: float, rows: list[str]) -> str:
    shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    return f"step {step + 1}: the {what} is not finite (learning rate {rate:g}; rows {shown})"
