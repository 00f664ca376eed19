"""Training to the end: steps, evaluations and what is saved of them."""

import json
from dataclasses import dataclass, replace
from typing import TextIO

from lowres_ft import batches, device, evaluate, stopping, train
from lowres_ft.batches import Tokens
from lowres_ft.checkpoint import Record
from lowres_ft.course import Clock, Course
from lowres_ft.data import Data
from lowres_ft.device import Machine
from lowres_ft.events import Evaluated, Listener, Note, Trained, unheard
from lowres_ft.expectation import Expected
from lowres_ft.model import Adapted
from lowres_ft.pace import Pace
from lowres_ft.plan import Plan
from lowres_ft.recipe import Recipe
from lowres_ft.report import Measured
from lowres_ft.saving import Keeper
from lowres_ft.train import TrainState
from lowres_ft.trial import Trial


@dataclass(frozen=True)
class Ready:
    """All that training needs."""

    recipe: Recipe
    rows: Data
    adapted: Adapted
    tokens: dict[str, Tokens]
    plan: Plan
    notes: tuple[str, ...]
    expected: Expected | None = None
    """What the run was expected to take, if that was asked."""
    trial: Trial | None = None
    """What was measured before the first step."""

    @property
    def pace(self) -> Pace | None:
        """Seconds of what the run does, as well as they are known."""
        told = None if self.expected is None else self.expected.pace
        return told if self.trial is None else self.trial.pace


def fit(
    ready: Ready, machine: Machine, log: TextIO, listen: Listener = unheard, keeper: Keeper | None = None
) -> Measured:
    """Train to the end, evaluating as the recipe says, and leave the best step's tensors in the model.

    A line of JSON for each step and each evaluation goes to `log`. A `keeper` says where the run goes on and saves it.
    """
    adapted, tokens, plan = ready.adapted, ready.tokens, ready.plan
    keeper = keeper or Keeper()
    state = train.start(ready.recipe, adapted, tokens["train"], plan)
    record = keeper.begin(state, plan, log)
    spec = state.spec
    clock = Clock(Course.of(ready.recipe, plan, tokens), ready.pace)
    every = spec.evaluate_every or batches.steps_per_epoch(len(tokens["train"]), spec.batch_size)
    with keeper.watching(state, record, plan):
        steps = keeper.taken(train.train(state, tokens["train"], plan, machine), record, log)
        while True:
            due = state.step > 0 and (state.step % every == 0 or state.step == state.total)
            if "validation" in tokens and due and not record.evaluated(state.step):
                _evaluate(ready, machine, state, record, log, listen)
            keeper.keep(state, record, plan)
            if (step := next(steps, None)) is None:
                break
            tell(adapted, listen)
            listen(Trained(step, state.total, clock.left(step)))
    state.restore_best()
    measured = Measured.of(record.steps, record.evaluations, state.best_step, plan.device)
    return replace(measured, peak_bytes=max(record.peak_bytes, measured.peak_bytes))


def _evaluate(ready: Ready, machine: Machine, state: TrainState, record: Record, log: TextIO, listen: Listener) -> None:
    """Score the validation rows after the current step, for early stopping and the best step."""
    tokens, task = ready.tokens["validation"], ready.adapted.task
    predicted = evaluate.outputs(ready.adapted, tokens, ready.plan)
    tell(ready.adapted, listen)
    value = evaluate.metric(task.tune(tokens.truth, predicted), tokens.truth, predicted)  # as the end result is scored
    value = float(device.same_for_all(machine, repr(value)))  # all processes stop at the same step
    with stopping.deferred():
        state.record(value)
        record.evaluations.append((state.step, value))
        log.write(json.dumps({"number": state.step, task.metric: value}) + "\n")
    listen(Evaluated(state.step, task.metric, value))


def tell(adapted: Adapted, listen: Listener) -> None:
    """Say what was found out about memory since the last time."""
    while adapted.room.told:
        listen(Note(adapted.room.told.pop(0)))
