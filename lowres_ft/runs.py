"""The folder of a run: claimed and locked, emptied of what a killed run left, and gone when the bundle stands."""

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from lowres_ft import checkpoint, device, files, resuming
from lowres_ft.checkpoint import Checkpoint
from lowres_ft.device import Machine
from lowres_ft.errors import OutputError
from lowres_ft.recipe import Recipe
from lowres_ft.resuming import Unfinished, UnfinishedError

_KEPT = ("run.json", "plan.json", "metrics.jsonl", "checkpoints")
_OURS = ("lock", "work", "bundle", *_KEPT)


@dataclass(frozen=True)
class Place:
    """Where a run writes. Processes other than the first write to a folder of their own, which goes afterwards."""

    out: Path
    folder: Path
    found: Checkpoint | None = None
    """Where the run goes on."""
    finished: bool = False
    """The bundle stands already."""
    notes: tuple[str, ...] = ()

    @property
    def work(self) -> Path:
        """Rows and tokens, gone after the run."""
        return self.folder / "work"

    @property
    def draft(self) -> Path:
        """The bundle while it is written."""
        return self.folder / "bundle"

    @property
    def metrics(self) -> Path:
        """One line for each step and evaluation."""
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Where the run can go on from."""
        return self.folder / resuming.CHECKPOINTS


@dataclass(frozen=True)
class Wish:
    """What is to become of an interrupted run of a recipe: go on, begin anew, or (None) be left alone."""

    recipe: Recipe
    resume: bool | None


@contextmanager
def run_folder(name: str, out: str | Path | None, machine: Machine, wish: Wish | None = None) -> Iterator[Place]:
    """Claim `<out>.run`, by default of the first free `runs/<name>`, `runs/<name>-2`, ...

    It goes when the bundle stands, or when the run ends before it has trained a step. What is kept is noted on the
    exception that ends the run.

    Raises:
        OutputError: `out` exists, another run is writing there, one was interrupted there, or it cannot be written.
    """
    if machine.rank:
        with tempfile.TemporaryDirectory(prefix="lowres-ft-") as folder:
            place = _as_claimed(device.same_for_all(machine, ""), Path(folder))
            place.work.mkdir()
            yield place
        return
    place, lock = _claimed(Path("runs") / name if out is None else Path(out), wish, next_free=out is None)
    told = {"out": str(place.out), "finished": place.finished, "checkpoint": place.found and str(place.found.folder)}
    device.same_for_all(machine, json.dumps(told))
    kept = False
    try:
        yield place
    except BaseException as stopped:
        found, _ = checkpoint.newest(place.checkpoints)
        kept = found is not None or (place.metrics.is_file() and place.metrics.stat().st_size > 0)
        if kept or isinstance(stopped, KeyboardInterrupt | SystemExit):
            stopped.add_note(_what_is_kept(place.folder, found, kept=kept))
        raise
    finally:
        shutil.rmtree(place.work, ignore_errors=True)
        shutil.rmtree(place.draft, ignore_errors=True)
        if not kept:
            shutil.rmtree(place.folder, ignore_errors=True)
        lock.release()


def _what_is_kept(folder: Path, found: Checkpoint | None, *, kept: bool) -> str:
    if found is not None:
        what = f"{folder} keeps the run up to step {found.step} of {found.total}; --resume goes on from there"
    else:
        what = f"{folder} keeps plan.json and metrics.jsonl" if kept else "nothing was kept"
    return f"no bundle was written; {what}"


def _as_claimed(told: str, folder: Path) -> Place:
    """The place that the first process claimed, in another one."""
    first = json.loads(told)
    found = None
    if first["checkpoint"] is not None:
        found, _ = checkpoint.newest(Path(first["checkpoint"]).parent)
        if found is None or str(found.folder) != first["checkpoint"]:
            raise OutputError(f"{first['checkpoint']} cannot be read", hint="All processes need the run's folder.")
    return Place(Path(first["out"]), folder, found, bool(first["finished"]))


def unfinished(recipe: Recipe, out: Path | None) -> Unfinished | None:
    """The interrupted run on which `run` would have to be told whether to go on; None where there is none.

    Without `out`, that is the newest of the recipe's own places that holds the same experiment.
    """
    if out is not None:
        found = resuming.look(out, recipe)
        return None if found is None or _is_locked(out) else found
    several = [one for place in _places(recipe.name) if (one := resuming.look(place, recipe)) and one.same]
    several = [one for one in several if not _is_locked(one.out)]
    return max(several, key=lambda one: one.checkpoint.folder.stat().st_mtime, default=None)


def _places(name: str) -> list[Path]:
    """Where runs of a recipe have written by default."""
    first = Path("runs") / name
    found = {path.with_name(path.name.removesuffix(".run")) for path in first.parent.glob(f"{name}*")}
    return sorted(path for path in found if path == first or path.name.removeprefix(f"{name}-").isdecimal())


def _is_locked(out: Path) -> bool:
    with suppress(OSError, Timeout), FileLock(resuming.folder_of(out) / "lock", timeout=0):
        return False
    return True


class _TakenError(OutputError):
    """A bundle stands there, or another run is writing there."""


def _claimed(first: Path, wish: Wish | None, *, next_free: bool) -> tuple[Place, FileLock]:
    """Claim a place, or, by default, the first that is free; before it, one with an interrupted run of the same."""
    if not next_free:
        return _claim(first, wish)
    if wish is not None:
        if found := unfinished(wish.recipe, None):
            return _claim(found.out, wish)
        done = [place for place in _places(wish.recipe.name) if resuming.finished(place, wish.recipe)]
        if wish.resume and done:
            return _claim(max(done, key=lambda place: place.stat().st_mtime), wish)
    for number in itertools.count(1):
        place = first if number == 1 else first.with_name(f"{first.name}-{number}")
        if wish is not None and resuming.look(place, wish.recipe):
            continue  # of another experiment
        try:
            return _claim(place, wish)
        except _TakenError:
            continue
    raise AssertionError("there is always a next number")


def _claim(out: Path, wish: Wish | None) -> tuple[Place, FileLock]:
    """Lock the run folder of `out`, and empty it of all but what the run goes on with."""
    done = wish is not None and bool(wish.resume) and resuming.finished(out, wish.recipe)
    if not done:
        _require_free(out)
    folder = resuming.folder_of(out)
    with files.writing(folder):
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        _require_own(folder)
        lock = FileLock(folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise _TakenError(f"another run is writing to {folder}", hint="Wait, or choose another --out.") from None
        try:
            if not done:
                _require_free(out)  # again: another run may have ended since
            place = Place(out, folder, finished=True) if done else _opened(Place(out, folder), wish)
            place.work.mkdir()
            place.draft.mkdir()
        except BaseException as error:
            if made or isinstance(error, _TakenError):
                shutil.rmtree(folder)
            lock.release()
            raise
    return place, lock


def _opened(place: Place, wish: Wish | None) -> Place:
    """A locked place, with the checkpoint from which it goes on, if it does."""
    found, damaged = checkpoint.newest(place.checkpoints)
    resume = None if wish is None else wish.resume
    if found is not None and resume is None:
        raise UnfinishedError(
            f"{place.folder} holds an unfinished run, at step {found.step} of {found.total}",
            hint="--resume goes on; --restart begins anew.",
        )
    if found is None and damaged and not resume and resume is not False:
        raise UnfinishedError(damaged[0], hint="--restart begins anew.")
    notes = tuple(damaged)
    if resume and found is None:
        notes += (f"{place.folder} holds no checkpoint: the run begins at its first step",)
    if resume and found is not None:
        assert wish is not None
        resuming.require_same(place.folder, "recipe", resuming.experiment(wish.recipe))
        notes += (f"going on after step {found.step} of {found.total}",)
    going_on = found if resume else None
    _clear(place.folder, keep=going_on is not None)
    return Place(place.out, place.folder, going_on, notes=notes)


def _require_free(out: Path) -> None:
    with files.writing(out):
        if out.exists():
            raise _TakenError(f"{out} exists", hint="Choose another place with --out, or remove it.")


def _require_own(folder: Path) -> None:
    """Refuse to take a folder that holds something that no run writes."""
    names = [path.name for path in folder.iterdir()]
    strangers = sorted(name for name in names if name not in _OURS and not files.is_draft(name))
    if strangers:
        told = f"{folder} is where the run would keep its files, but it holds {', '.join(strangers[:3])}"
        raise OutputError(told, hint="Choose another place with --out, or move that folder.")


def _clear(folder: Path, *, keep: bool) -> None:
    """Remove what a run that was killed left in its folder, but for what it goes on with."""
    for leftover in folder.iterdir():
        if leftover.name != "lock" and not (keep and leftover.name in _KEPT):
            files.remove(leftover)
    checkpoint.discard(folder / resuming.CHECKPOINTS)
