"""Will it fit, and how fast is it: on this machine, and on others that people have."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lowres_ft import assets, bases, budget, catalogue, device, memory, profiles, quantize, speed, tables, timings
from lowres_ft import plan as plans
from lowres_ft.bases import Base
from lowres_ft.budget import Accounts
from lowres_ft.catalogue import Entry
from lowres_ft.changes import Remedy
from lowres_ft.device import Machine
from lowres_ft.memory import Memory
from lowres_ft.plan import Plan
from lowres_ft.profiles import Profile
from lowres_ft.recipe import Recipe, load_recipe
from lowres_ft.sizes import parse_bytes
from lowres_ft.speed import Rates

_RECIPES = {"classification": "sentiment-lora", "ner": "entities-lora", "chat": "chat-lora-int8"}
"""The recipe by which a base is tried for a task."""
_PRESUMED = ("0", "1")  # labels, where rows are not read to find them


@dataclass(frozen=True)
class Target:
    """A device that may run a recipe."""

    machine: Machine
    memory: int
    """Bytes that a run may take there."""
    rates: Rates


@dataclass(frozen=True)
class Forecast:
    """A recipe on a device."""

    target: Target
    plan: Plan
    memory: Memory
    fits: bool
    settings: tuple[str, ...]
    """What differs from the recipe and from the plan that the device would have with more memory."""
    step_seconds: float
    """Of a step of texts as long as the recipe lets them be."""
    tokens_per_second: float
    remedies: tuple[Remedy, ...] = ()
    """Where it does not fit: what changes of the recipe would save."""

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "device": self.target.machine.name,
            "memory_bytes": self.target.memory,
            "fits": self.fits,
            "settings": list(self.settings),
            "memory": self.memory.to_json(),
            "step_seconds": self.step_seconds,
            "tokens_per_second": self.tokens_per_second,
            "remedies": {remedy.change: remedy.saves for remedy in self.remedies},
            "plan": self.plan.model_dump(mode="json"),
        }


@dataclass(frozen=True)
class Outlook:
    """A recipe, its base, and what is to be expected of them."""

    profile: Profile
    trainable_parameters: int
    here: Forecast
    others: tuple[Forecast, ...]


def outlook(
    recipe: Recipe, *, device_name: str = "auto", processes: int = 1, progress: assets.Progress | None = None
) -> Outlook:
    """Tell what a recipe takes on this machine and on others. No rows and no weights are read.

    `processes` share each step, each on a device of its own. Texts are taken to be as long as the recipe lets them be.

    Raises:
        LowresError: The base is not found, or cannot be used as the recipe says.
    """
    machine = replace(device.find(device_name), processes=processes)
    recipe = presumed(recipe)
    with TemporaryDirectory(prefix="lowres-ft-") as folder:
        base = _base(recipe, Path(folder), progress)
        profile = profiles.profile(base, recipe.task)
        profiles.require_length(profile, recipe.task)
        quantize.require_widths(profile, recipe.model.quantize)
        accounts = Accounts(base, profile)
        here = Target(machine, budget.room(recipe, machine) or device.total_bytes(machine.device), speed.known(machine))
        found = [forecast(recipe, accounts, target) for target in (here, *usual(processes))]
    return Outlook(profile, profiles.trainable(recipe.method, profile), found[0], tuple(found[1:]))


def presumed(recipe: Recipe) -> Recipe:
    """A recipe whose labels would be found in its rows, with two of them."""
    if "labels" in type(recipe.task).model_fields and not recipe.task.names:
        return recipe.model_copy(update={"task": recipe.task.model_copy(update={"labels": _PRESUMED})})
    return recipe


def usual(processes: int = 1) -> Iterator[Target]:
    """Devices that people have."""
    for entry in tables.read("devices"):
        machine = Machine(entry["kind"], entry["name"], entry["dtype"], threads=1, host="", processes=processes)
        yield Target(machine, parse_bytes(entry["memory"]), speed.of_table(entry))


def forecast(recipe: Recipe, accounts: Accounts, target: Target, *, remedies: bool = True) -> Forecast:
    """A recipe on a device, by the first plan that fits there, else the most frugal one.

    Devices share `accounts`.
    """
    profile = accounts.profile
    first = plan = plans.make(recipe, profile, target.machine)
    for plan in budget.plans(recipe, first, profile):
        if accounts.bytes(recipe, plan) <= target.memory:
            break
    needed, done = accounts.of(recipe, plan)
    fits = accounts.bytes(recipe, plan) <= target.memory
    listed = remedies and not fits
    left = budget.ways(plan, accounts.bytes).remedies(recipe, accounts.bytes(recipe, plan)) if listed else []
    rows, width = done.rows, done.width
    taken = speed.seconds(done.training, plan.dtype, target.rates, speed.share(recipe, target.machine.kind))
    taken = max(taken, speed.passing(done.held.passing, target.rates))  # layers come while others compute
    step = taken * recipe.train.batch_size / (rows * plan.processes)
    return Forecast(
        target=target,
        plan=plan,
        memory=needed,
        fits=fits,
        settings=_settings(first, plan),
        step_seconds=step,
        tokens_per_second=recipe.train.batch_size * width / step,
        remedies=tuple(left),
    )


def of_entry(entry: Entry, task: str | None, machine: Machine) -> dict[str, Any]:
    """A base of the catalogue on a machine, with the shipped recipe for a task; worked out once and kept.

    What is kept says `recipe`, `fits`, `memory_bytes`, `step_seconds` and `tokens_per_second`.
    """
    name = _RECIPES[task or entry.tasks[-1]]

    target = Target(machine, device.total_bytes(machine.device), speed.known(machine))

    def found() -> dict[str, Any]:
        recipe = presumed(load_recipe(name, [f"model.base={entry.name}"]))
        with TemporaryDirectory(prefix="lowres-ft-") as folder:
            base = _base(recipe, Path(folder), None)
            one = forecast(recipe, Accounts(base, profiles.profile(base, recipe.task)), target, remedies=False)
        return {
            "recipe": name,
            "fits": one.fits,
            "memory_bytes": one.memory.total,
            "step_seconds": one.step_seconds,
            "tokens_per_second": one.tokens_per_second,
        }

    what = f"forecast {entry.model_dump_json()} {name} {memory.basis()} {target}"
    kept: dict[str, Any] = timings.once(machine, machine.dtype, what, found)
    return kept


def _settings(first: Plan, plan: Plan) -> tuple[str, ...]:
    """What a plan has otherwise than the first one."""
    before, after = first.model_dump(mode="json"), plan.model_dump(mode="json")
    names = ("micro_batch_tokens", "recompute", "attention_kernels", "offload")
    return tuple(f"{name}={after[name]}" for name in names if before[name] != after[name])


def _base(recipe: Recipe, folder: Path, progress: assets.Progress | None) -> Base:
    """The base, of which the config is enough: one of the catalogue needs no network."""
    entry = catalogue.find(recipe.model.base)
    if entry is None or recipe.model.revision is not None or Path(recipe.model.base).exists():
        return bases.glance(recipe.model, progress)
    (folder / "config.json").write_text(json.dumps(entry.config), encoding="utf-8")
    return Base(recipe.model.base, folder, recipe.model.base)
