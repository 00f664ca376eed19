"""One optimizer step: a gradient that is exact under any cut, and what is done again of it where memory runs out."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lowres_ft import allocator, optimizers, shortage, stopping
from lowres_ft.batches import Tokens, cut
from lowres_ft.device import Machine, sum_over_processes
from lowres_ft.errors import TrainingError
from lowres_ft.packing import micro_batches
from lowres_ft.plan import Plan
from lowres_ft.tasks.base import Batch

if TYPE_CHECKING:
    from lowres_ft.train import TrainState

_SCALE_GROWS_AFTER = 1000  # steps without an overflow


class Attempt:
    """A step that goes on where it was when memory ran out.

    Each process cuts its share finer by itself, and none repeats what others would have to repeat, too: a gradient is
    exchanged once, and once it stands only what is left to do with it is done again.
    """

    def __init__(
        self, state: "TrainState", tokens: Tokens, positions: np.ndarray, plan: Plan, machine: Machine, rate: float
    ) -> None:
        self.state, self.tokens, self.positions = state, tokens, positions
        self.plan, self.machine, self.rate = plan, machine, rate
        self.mine = positions[machine.rank :: machine.processes]
        self.loss: float | None = None  # once the gradient of all processes stands
        self.norm: float | None = None  # once that is known to be finite
        self.unscaled: list[Tensor] = []
        self.left = list(state.optimizer.param_groups)  # what is not updated
        self.retaken = False

    def take(self) -> tuple[float, float]:
        """Take the step; return its loss, and its gradient's norm before clipping."""
        loss, norm = self.gradient()
        _update(self.state, self.rate, norm, self.left, self.unscaled)
        if self.plan.dtype == "float16":
            _count_at_scale(self.state)
        return loss, norm

    def gradient(self) -> tuple[float, float]:
        """Leave the step's gradient, times the loss scale, in the parameters; return its loss, and its norm unscaled.

        In fp16 a step whose gradient overflows is done again at half the loss scale, not skipped.
        """
        state = self.state
        while True:
            if self.loss is None:
                self.loss, self.norm = self._summed(), None
            if self.norm is None:
                gradients = [p.grad for p in state.adapted.trained().values() if p.grad is not None]
                norm = float(torch.nn.utils.get_total_norm(gradients)) / state.loss_scale
                if math.isfinite(norm):
                    self.unscaled, self.norm = gradients, norm
            if self.norm is not None:
                return self.loss, self.norm
            if self.plan.dtype != "float16":
                raise _not_finite("gradient", state.step, self.rate, self.tokens.where(self.positions))
            _halve_scale(state)
            self.loss = None

    def _summed(self) -> float:
        """Leave the gradient, summed over all processes, in the parameters; return the loss."""
        state, tokens, task = self.state, self.tokens, self.state.adapted.task
        targets = np.concatenate([tokens.target(position) for position in self.positions])
        count = task.counted(targets) or 1.0
        state.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), dtype=torch.float64)  # on the processor: MPS has no float64
        for part, batch in micro_batches(self.mine, tokens, _cut_plan(state, self.plan), state.adapted):
            summed = _backward(state, batch, state.loss_scale / count)
            if not math.isfinite(summed):
                raise _not_finite("loss", state.step, self.rate, tokens.where(part))
            loss += summed / count
            allocator.tidy()
            stopping.check()  # a step that is half done is dropped
        for parameter in state.adapted.trained().values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if self.machine.processes > 1:
            gradients = [p.grad for p in state.adapted.trained().values() if p.grad is not None]
            sum_over_processes([*gradients, loss])
        return float(loss)

    def relieve(self, said: str) -> None:
        """Make room after memory ran out: let the largest micro-batch be half as large, or have the gradient alone.

        Raises:
            OutOfMemoryError: Nothing more can be done.
        """
        step = self.state.step
        optimizers.rewind(self.state.optimizer, self.left, step)
        if self.loss is None:
            self.state.optimizer.zero_grad(set_to_none=True)
            self.cut_finer(said)
        elif self.retaken:
            raise shortage.exhausted(f"step {step + 1}, by a gradient that stands", said)
        else:
            self.retaken = True
            shortage.release(self.plan.device)

    def cut_finer(self, said: str) -> None:
        """Let the largest micro-batch of this process be half as large from here on.

        Raises:
            OutOfMemoryError: Each sequence passed on its own already, or the plan's cut has to stay.
        """
        state, tokens, plan = self.state, self.tokens, self.plan
        shortage.release(plan.device)
        what = f"step {state.step + 1}"
        if plan.pinned_cut:
            why = "dropout inside the base ties the result to its micro-batches, so that they cannot be made smaller"
            raise shortage.exhausted(f"{what}; {why}", said, hint="Use model.dropout=0.")
        parts = list(cut(self.mine, tokens.lengths, state.cut or plan.micro_batch_tokens))
        several = [len(part) * int(tokens.lengths[part].max()) for part in parts if len(part) > 1]
        if not parts:
            raise shortage.exhausted(f"{what}, of which this process has no text", said)
        if not several:
            where = tokens.where(parts[0][:1])[0]
            longest = int(tokens.lengths[self.mine].max())
            raise shortage.exhausted(f"{what}, one text at a time, of which {where} has {longest:,} tokens", said)
        state.adapted.room.shrink_training(max(several) // 2, state.step + 1)


def _cut_plan(state: "TrainState", plan: Plan) -> Plan:
    """The plan, with micro-batches as small as memory turned out to ask for."""
    return plan if state.cut is None else plan.model_copy(update={"micro_batch_tokens": state.cut})


def _backward(state: "TrainState", batch: Batch, scale: float) -> float:
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


def _halve_scale(state: "TrainState") -> None:
    """Halve the loss scale after an overflow.

    Raises:
        TrainingError: It is so small that the gradient overflows at any.
    """
    if state.loss_scale < 2.0**-10:
        raise TrainingError(
            f"step {state.step + 1}: the gradient overflows fp16 at any loss scale", hint=_NOT_FINITE_HINT
        )
    state.loss_scale, state.steps_at_scale = state.loss_scale / 2, 0


def _count_at_scale(state: "TrainState") -> None:
    """Count a step without an overflow; after many the loss scale is doubled."""
    state.steps_at_scale += 1
    if state.steps_at_scale == _SCALE_GROWS_AFTER:
        state.loss_scale, state.steps_at_scale = state.loss_scale * 2, 0


def _update(state: "TrainState", rate: float, norm: float, left: list[dict[str, Any]], unscaled: list[Tensor]) -> None:
    """Clip the gradient and take the optimizer's step.

    What is scaled leaves `unscaled` and what is updated leaves `left`, so that nothing is done twice.
    """
    factor = min(1.0, (state.spec.clip or math.inf) / (norm + 1e-6)) / state.loss_scale
    while unscaled:
        if factor != 1.0:
            unscaled[-1].mul_(factor)
        unscaled.pop()
    while left:
        left[0]["lr"] = rate * left[0]["rate"]
        optimizers.step(state.optimizer, left[0])
        del left[0]


_NOT_FINITE_HINT = "Lower train.learning_rate, or use model.dtype=float32."
_AT_ONCE_HINT = "Nothing was learned yet: the base's weights are at fault, or model.dtype=float32 is needed."


def _not_finite(what: str, step: int, rate: float, rows: list[str]) -> TrainingError:
    shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    told = f"step {step + 1}: the {what} is not finite (learning rate {rate:g}; rows {shown})"
    return TrainingError(told, hint=_NOT_FINITE_HINT if step else _AT_ONCE_HINT)
