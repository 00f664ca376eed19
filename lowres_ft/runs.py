"""The folder of a run: claimed and locked, emptied of what a killed run left, and gone when the bundle stands."""

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from lowres_ft import device, files
from lowres_ft.device import Machine
from lowres_ft.errors import OutputError

_OURS = ("lock", "plan.json", "metrics.jsonl", "work", "bundle")


@dataclass(frozen=True)
class Place:
    """Where a run writes. Processes other than the first write to a folder of their own, which goes afterwards."""

    out: Path
    folder: Path

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


@contextmanager
def run_folder(name: str, out: str | Path | None, machine: Machine) -> Iterator[Place]:
    """Claim `<out>.run`, by default of the first free `runs/<name>`, `runs/<name>-2`, ...

    It goes when the bundle stands, or when the run ends before it has trained a step. What is kept is noted on the
    exception that ends the run.

    Raises:
        OutputError: `out` exists, another run is writing there, or it cannot be written.
    """
    if machine.rank:
        with tempfile.TemporaryDirectory(prefix="lowres-ft-") as folder:
            place = Place(Path(device.same_for_all(machine, "")), Path(folder))
            place.work.mkdir()
            yield place
        return
    place, lock = _claim(Path(out)) if out is not None else _claim_next(Path("runs") / name)
    device.same_for_all(machine, str(place.out))
    kept = False
    try:
        yield place
    except BaseException as stopped:
        kept = place.metrics.is_file() and place.metrics.stat().st_size > 0
        if kept or isinstance(stopped, KeyboardInterrupt | SystemExit):
            what = f"{place.folder} keeps plan.json and metrics.jsonl" if kept else "nothing was kept"
            stopped.add_note(f"no bundle was written; {what}")
        raise
    finally:
        shutil.rmtree(place.work, ignore_errors=True)
        shutil.rmtree(place.draft, ignore_errors=True)
        if not kept:
            shutil.rmtree(place.folder, ignore_errors=True)
        lock.release()


class _TakenError(OutputError):
    """A bundle stands there, or another run is writing there."""


def _claim_next(first: Path) -> tuple[Place, FileLock]:
    """Claim the first place that is free."""
    for number in itertools.count(1):
        try:
            return _claim(first if number == 1 else first.with_name(f"{first.name}-{number}"))
        except _TakenError:
            continue
    raise AssertionError("there is always a next number")


def _claim(out: Path) -> tuple[Place, FileLock]:
    """Lock and empty the run folder of `out`."""
    _require_free(out)
    folder = out.with_name(f"{out.name}.run")
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _require_own(folder)
        lock = FileLock(folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise _TakenError(f"another run is writing to {folder}", hint="Wait, or choose another --out.") from None
        try:
            _require_free(out)  # again: another run may have ended since
        except _TakenError:
            shutil.rmtree(folder)
            lock.release()
            raise
        _clear(folder)
        place = Place(out, folder)
        place.work.mkdir()
        place.draft.mkdir()
    return place, lock


def _require_free(out: Path) -> None:
    with files.writing(out):
        if out.exists():
            raise _TakenError(f"{out} exists", hint="Choose another place with --out, or remove it.")


def _require_own(folder: Path) -> None:
    """Refuse to take a folder that holds something that no run writes."""
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in _OURS)
    if strangers:
        told = f"{folder} is where the run would keep its files, but it holds {', '.join(strangers[:3])}"
        raise OutputError(told, hint="Choose another place with --out, or move that folder.")


def _clear(folder: Path) -> None:
    """Remove what a run that was killed left in its folder."""
    for leftover in folder.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        elif leftover.name != "lock":
            leftover.unlink()
