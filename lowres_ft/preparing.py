"""What comes before training: a recipe's rows and base made ready, or only looked at."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lowres_ft import (
    assets,
    bases,
    batches,
    behaviour,
    budget,
    data,
    device,
    expectation,
    files,
    limits,
    model,
    optimizers,
    profiles,
    quantize,
    resuming,
    shortage,
    trial,
)
from lowres_ft import plan as plans
from lowres_ft.bases import Base
from lowres_ft.batches import Reader, Tokens
from lowres_ft.course import Course
from lowres_ft.data import Data
from lowres_ft.device import Machine
from lowres_ft.events import Fetching, Listener, Note, Stage, unheard
from lowres_ft.fitting import Ready, tell
from lowres_ft.pace import Shape
from lowres_ft.plan import Plan
from lowres_ft.profiles import Profile
from lowres_ft.recipe import Recipe
from lowres_ft.runs import Place
from lowres_ft.tasks.base import Task
from lowres_ft.tokenizing import load_tokenizer

_SAMPLED = 1024  # rows of a split whose lengths stand for all of them


@dataclass(frozen=True)
class Rehearsal:
    """What a run would do, as far as can be told without loading weights."""

    rows: dict[str, int]
    """Rows of each split."""
    labels: tuple[str, ...]
    adapted: int
    """Linear layers that are adapted."""
    trainable_parameters: int
    steps: int
    profile: Profile
    plan: Plan
    memory_bytes: int | None
    """Peak, with texts as long as the recipe lets them be; None where it cannot be told."""
    seconds: float | None
    """Of all training steps, by the lengths of some rows."""


def rehearse(recipe: Recipe, *, device_name: str = "auto", listen: Listener = unheard) -> Rehearsal:
    """Read the data and look at the base, but load and train nothing.

    Raises:
        LowresError: What `run` would raise before its first step.
    """
    machine = device.find(device_name)
    with tempfile.TemporaryDirectory(prefix="lowres-ft-") as folder:
        rows = data.load(recipe, Path(folder), progress(listen))
        base = bases.resolve(recipe.model, progress(listen))
        profile = profiled(recipe, rows.task, base, machine)
        reader = _reader(rows.task, base)
        splits, seed = rows.splits(), recipe.train.seed
        few = {name: batches.sample(reader, split, _SAMPLED, seed) for name, split in splits.items()}
    sizes = {name: len(split) for name, split in splits.items()}
    resolved = recipe.model_copy(update={"task": rows.task})
    plan = budget.within(resolved, base, profile, plans.make(recipe, profile, machine), machine, _cut(few))
    course = Course.of(resolved, plan, few, sizes, recipe.task.max_length)
    expected = expectation.expect(resolved, base, profile, plan, machine, course)
    return Rehearsal(
        rows=sizes,
        labels=rows.task.names,
        adapted=len(profiles.targets(recipe.method, profile.linears)),
        trainable_parameters=profiles.trainable(recipe.method, profile),
        profile=profile,
        steps=course.steps,
        plan=plan,
        memory_bytes=None if expected.memory is None else expected.memory.total,
        seconds=expected.seconds,
    )


def prepare(resolved: Recipe, rows: Data, machine: Machine, place: Place, listen: Listener = unheard) -> Ready:
    """Load the base and tokenize the rows; what cannot work is told before any weight is read."""
    base = bases.resolve(resolved.model, progress(listen))
    profile = profiled(resolved, resolved.task, base, machine)
    like = None if place.found is None else place.found.plan
    listen(Stage("tokenizing"))
    reader = _reader(resolved.task, base)
    tokens = {name: batches.tokenize(reader, split, place.work / name) for name, split in rows.splits().items()}
    first = plans.make(resolved, profile, machine, like=like)
    plan = budget.within(resolved, base, profile, first, machine, _cut(tokens))
    plan, replanned = resuming.settled(plan, place.found, resolved)
    for text in replanned:
        listen(Note(text))
    if plan.pinned_cut:
        listen(Note("dropout inside the base ties the result to this machine's cut of a step (model.dropout)"))
    listen(Stage(f"loading {resolved.model.base} on {machine.name} in {plan.dtype}"))
    expected = expectation.expect(resolved, base, profile, plan, machine, Course.of(resolved, plan, tokens))
    adapted = shortage.twice(partial(model.load, resolved, base, profile, plan, reader.tokenizer), plan.device)
    limits.trim()  # of what loading took beside the model
    plan, revised = behaviour.revise(adapted, plan)
    files.write_json(place.folder / "plan.json", plan.model_dump(mode="json"))
    revised += (expected.untold,) if expected.untold else ()
    told = [*revised, *(batches.told(name, split) for name, split in tokens.items() if split.left_out)]
    for text in told:
        listen(Note(text))
    return Ready(resolved, rows, adapted, tokens, plan, (*rows.notes, *told), expected)


def _cut(tokens: Mapping[str, Tokens]) -> Callable[[Recipe, Plan], list[Shape]]:
    """How a plan cuts rows; in a recipe that lets them be less long, they are cut off there."""

    def cut(recipe: Recipe, plan: Plan) -> list[Shape]:
        longest = recipe.task.max_length
        shapes = Course.of(recipe, plan, tokens).micro_batches
        return sorted({(rows, min(width, longest)) for rows, width in shapes})

    return cut


def _reader(task: Task, base: Base) -> Reader:
    tokenizer = load_tokenizer(base.folder)
    task.prepare(tokenizer)
    return Reader(task, tokenizer)


def tried(ready: Ready, machine: Machine, place: Place, listen: Listener) -> Ready:
    """Measure, where the recipe says so, what the run is going to do; a new one may get a finer cut by it."""
    if not ready.recipe.budget.probe or ready.expected is None:
        return ready
    listen(Stage("trying the longest texts"))
    subject = (ready.recipe, ready.adapted, ready.tokens)
    plan = ready.plan
    if place.found is None:
        plan = trial.choose(*subject, plan, machine, ready.expected)
        files.write_json(place.folder / "plan.json", plan.model_dump(mode="json"))
    expected = replace(ready.expected, course=Course.of(ready.recipe, plan, ready.tokens))
    found = trial.run(*subject, plan, machine, expected)
    tell(ready.adapted, listen)
    return replace(ready, plan=plan, expected=expected, trial=found)


def profiled(recipe: Recipe, task: Task, base: Base, machine: Machine) -> Profile:
    """The layers of a base, after what cannot work with them is told."""
    profile = profiles.profile(base, task)
    profiles.targets(recipe.method, profile.linears)
    profiles.require_length(profile, task)
    quantize.require_widths(profile, recipe.model.quantize)
    optimizers.require(recipe.train, machine.device)
    return profile


def progress(listen: Listener) -> assets.Progress:
    """What tells of downloads as events."""
    return lambda what, done, total: listen(Fetching(what, done, total))
