"""Which run a folder holds: `run.json` names its experiment, so that no other one goes on from its checkpoints."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowres_ft import checkpoint, files
from lowres_ft.bases import Base
from lowres_ft.checkpoint import Checkpoint
from lowres_ft.data import Data
from lowres_ft.device import Machine, versions
from lowres_ft.errors import OutputError
from lowres_ft.plan import Plan
from lowres_ft.recipe import Recipe
from lowres_ft.spec import shown

IDENTITY = "run.json"
CHECKPOINTS = "checkpoints"
_NOT_THE_EXPERIMENT = ("name", "summary", "budget", "train.checkpoint_every")
_TOLD = 12  # differences that are named at the most
_HINT = "Take the change back, or begin anew with --restart, which removes its checkpoints."
ROUNDING = "the result is equal to rounding, not to the byte"


class UnfinishedError(OutputError):
    """A run stands there that can go on."""


@dataclass(frozen=True)
class Unfinished:
    """A run that was interrupted."""

    out: Path
    checkpoint: Checkpoint
    same: bool
    """Whether it is of the experiment that was asked for."""


def experiment(recipe: Recipe) -> dict[str, Any]:
    """The values of a recipe that decide the result, by their dotted paths."""
    whole = recipe.model_dump(mode="json")
    found = dict(_flat(whole))
    return {
        path: value
        for path, value in found.items()
        if not any(path == name or path.startswith(f"{name}.") for name in _NOT_THE_EXPERIMENT)
    }


def digest(recipe: Recipe) -> str:
    """A hash of the experiment."""
    return hashlib.sha256(json.dumps(experiment(recipe), sort_keys=True).encode()).hexdigest()


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each value that is not the same: its path, what it was and what it is."""
    paths = [path for path in dict.fromkeys([*was, *now]) if was.get(path) != now.get(path)]
    return [f"{path}: was {_told(was, path)}, is {_told(now, path)}" for path in paths]


def _told(values: Mapping[str, Any], path: str) -> str:
    return shown(values[path]) if path in values else "not there"


def known(folder: Path) -> dict[str, Any]:
    """What `run.json` says; nothing where it cannot be read."""
    try:
        found = json.loads((folder / IDENTITY).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def require_same(folder: Path, part: str, now: Mapping[str, Any]) -> None:
    """Refuse to go on with another recipe, other data or another base; nothing is removed.

    Raises:
        OutputError: They differ from those of the run in `folder`; each difference is named.
    """
    was = known(folder).get(part)
    changed = ["run.json cannot be read"] if not isinstance(was, dict) else differences(was, now)
    if changed:
        more = [f"and {len(changed) - _TOLD} more"] if len(changed) > _TOLD else []
        lines = "\n  ".join([f"{folder} holds a run of another experiment", *changed[:_TOLD], *more])
        raise OutputError(lines, hint=_HINT)


def finished(out: Path, recipe: Recipe) -> bool:
    """Whether a bundle of this very experiment stands at `out`."""
    try:
        report = json.loads((out / "report.json").read_bytes())
        return bool(report["experiment"] == digest(recipe))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def folder_of(out: Path) -> Path:
    """Where a run keeps what will become the bundle at `out`; `.` and `..` are called as the folders themselves."""
    named = Path(os.path.abspath(out)) if out.name in ("", "..") else out
    return named.parent / f"{named.name}.run"


def look(out: Path, recipe: Recipe) -> Unfinished | None:
    """The interrupted run that would become the bundle at `out`."""
    folder = folder_of(out)
    found, _ = checkpoint.newest(folder / CHECKPOINTS)
    if found is None or out.exists():
        return None
    same = known(folder).get("recipe") == json.loads(json.dumps(experiment(recipe)))
    return Unfinished(out, found, same)


def note(folder: Path, recipe: Recipe, rows: Data, base: Base, machine: Machine, *, goes_on: bool) -> tuple[str, ...]:
    """Write `run.json`; where the run goes on, after data and base were compared with it. Return what to tell.

    Raises:
        OutputError: Data or base are others.
    """
    data = {f"data.{name}": value for name, value in rows.fingerprint().items()}
    identity = {f"model.{name}": value for name, value in base.identity().items()}
    place: dict[str, Any] = {"device": machine.device, "host": machine.host, "threads": machine.threads}
    place |= {"processes": machine.processes} | versions()
    told: tuple[str, ...] = ()
    resumed, budget = 0, recipe.budget.model_dump(mode="json")
    if goes_on:
        require_same(folder, "data", data)
        require_same(folder, "base", identity)
        before = known(folder)
        resumed, budget = int(before.get("resumed", 0)) + 1, before.get("budget", budget)
        if changed := differences(before.get("machine", {}), place):
            told = (f"the run began otherwise ({'; '.join(changed)}): {ROUNDING}",)
    content = {"format": 1, "recipe": experiment(recipe), "data": data, "base": identity, "machine": place}
    files.write_json(folder / IDENTITY, content | {"budget": budget, "resumed": resumed})
    return told


def settled(made: Plan, found: Checkpoint | None, recipe: Recipe) -> tuple[Plan, list[str]]:
    """The plan that a run goes on by: the one that it was begun by, where device and budget are those of then."""
    if found is None:
        return made, []
    kept = found.plan
    if kept.device.partition(":")[0] != made.device.partition(":")[0]:
        return made, [f"the run began on {kept.device} and goes on on {made.device} by a new plan: {ROUNDING}"]
    update = {name: getattr(made, name) for name in ("device", "threads", "processes")}
    kept = kept.model_copy(update=update)
    budget = recipe.budget.model_dump(mode="json")
    if known(found.folder.parents[1]).get("budget") == budget or made == kept:
        return kept, []
    changed = differences(kept.model_dump(mode="json"), made.model_dump(mode="json"))
    return made, [f"the budget was changed, and with it the plan ({'; '.join(changed)}): {ROUNDING}"]
