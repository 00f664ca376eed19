"""`python -m benchmarks`: lowres-ft and its peers, interleaved in one run, each in a process of its own.

This process imports nothing heavy: on Linux, what it holds would count as its children's peak memory.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from benchmarks import table, works
from benchmarks.works import WORKS, Work

_ROOT = Path(__file__).parent.parent
_RESULTS = Path(__file__).parent / "results"
_LIMIT = "limit"
_TOLD = 400  # characters of a failure


@dataclass(frozen=True)
class Session:
    """How the works of one run are measured."""

    repeats: int
    device: str
    quick: bool
    only: tuple[str, ...]
    """Contenders that are measured; empty for all."""

    def child(self, module: str, *arguments: object) -> tuple[float, str]:
        """Run a module in a process of its own; return its seconds, and what went wrong."""
        command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
        began = time.monotonic()
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
        wrong = "" if done.returncode == 0 else (done.stderr.strip() or f"exit {done.returncode}")[-_TOLD:]
        return time.monotonic() - began, wrong

    def order(self, work: Work, repeat: int) -> list[str]:
        """What is measured in a repeat, in turn; each repeat begins elsewhere."""
        names = [one.name for one in work.contenders if not self.only or one.name in self.only]
        names.append(_LIMIT)
        start = repeat * len(names) // self.repeats
        return names[start:] + names[:start]


def main(
    work: Annotated[list[str] | None, typer.Option(help="a, b, c or d; may be repeated.  [default: all]")] = None,
    contender: Annotated[
        list[str] | None, typer.Option(help='Measure only these, such as "ours bf16"; may be repeated.')
    ] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps, once: is everything in place?")] = False,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where all of them compute.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="The record.  [default: benchmarks/results/<time>.json]")] = None,
    show: Annotated[Path | None, typer.Option(help="Print the tables of a record; measure nothing.")] = None,
) -> None:
    """Measure lowres-ft and its peers on the same work; print medians, ratios and goals; write a record."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    if show is not None:
        raise typer.Exit(_print(json.loads(show.read_text(encoding="utf-8")), console))
    if unknown := set(work or ()) - set(WORKS):
        raise typer.BadParameter(f"no work {', '.join(sorted(unknown))}; there are {', '.join(WORKS)}")
    names = {one.name for each in WORKS.values() for one in each.contenders}
    if unknown := set(contender or ()) - names:
        raise typer.BadParameter(f"no contender {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
    session = Session(1 if quick else repeats, device, quick, tuple(contender or ()))
    started = datetime.now(UTC)
    out = out or _RESULTS / f"{started:%Y-%m-%d-%H%M}{'-quick' if quick else ''}.json"
    record = _new_record(session, started)
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        for name in work or WORKS:
            for _ in _measure(works.chosen(name, quick=quick), session, Path(folder) / name, record, console):
                _write(record, out)
    _write(record, out)
    console.print(f"\nwritten to {out}\n")
    raise typer.Exit(_print(record, console))


def _measure(
    work: Work, session: Session, folder: Path, record: dict[str, Any], console: Console
) -> Iterator[dict[str, Any]]:
    """Measure a work, yielding after each process what there is of it."""
    folder.mkdir()
    quick = ["--quick"] * session.quick
    console.print(f"({work.name}) {work.title}: rows ...")
    _, wrong = session.child("prepare", work.name, folder, "--device", session.device, *quick)
    if wrong:
        record["failures"].append({"work": work.name, "contender": "rows", "repeat": 0, "error": wrong})
        return
    prepared = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    record["machine"], record["versions"] = prepared.pop("machine"), prepared.pop("versions")
    measured = {"steps": work.steps, "work": asdict(work), "prepared": prepared, "limits": [], "results": []}
    record["works"][work.name] = measured
    for repeat in range(session.repeats):
        for name in session.order(work, repeat):
            result = folder / "result.json"
            options = ["--device", session.device, "--out", result]
            if name != _LIMIT:
                options += [work.name, name, "--folder", folder, "--seed", works.SEED + repeat, *quick]
            seconds, wrong = session.child("limit" if name == _LIMIT else "measure", *options)
            told = f"{name}, repeat {repeat + 1} of {session.repeats}: {_told(result, wrong)} ({seconds:.0f} s)"
            console.print(f"  {told}", markup=False, highlight=False)
            if wrong:
                record["failures"].append({"work": work.name, "contender": name, "repeat": repeat, "error": wrong})
            else:
                found = json.loads(result.read_text(encoding="utf-8")) | {"repeat": repeat}
                measured["limits" if name == _LIMIT else "results"].append(found)
            yield measured


def _told(result: Path, wrong: str) -> str:
    """One line on what a process found."""
    if wrong:
        return f"failed: {wrong.splitlines()[-1]}"
    found = json.loads(result.read_text(encoding="utf-8"))
    if "tokens/s" not in found:
        return ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in found.items())
    return f"{found['tokens/s']:,.0f} tokens/s, {found['memory'] / 1e9:.2f} GB, loss {found['loss']:.3f}"


def _new_record(session: Session, started: datetime) -> dict[str, Any]:
    git = ("git", "-C", str(_ROOT))
    return {
        "format": 1,
        "started": started.isoformat(timespec="seconds"),
        "repeats": session.repeats,
        "quick": session.quick,
        "device": session.device,
        "commit": _output([*git, "rev-parse", "HEAD"]),
        "changed_since": bool(_output([*git, "status", "--porcelain", "--untracked-files=no"])),
        "works": {},
        "failures": [],
    }


def _output(command: Sequence[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _write(record: dict[str, Any], out: Path) -> None:
    """Write what there is, after each process, so that a run that is stopped has not been in vain."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1), encoding="utf-8")
    part.replace(out)


def _print(record: dict[str, Any], console: Console) -> int:
    """Print the tables and what went wrong; return the exit code."""
    for one in table.tables(record):
        console.print(one)
        console.print()
    wrong = [
        f"{one['work']}, {one['contender']}: failed: {one['error'].splitlines()[-1]}" for one in record["failures"]
    ]
    wrong += table.disagreements(record)
    for sentence in wrong:
        console.print(f"error: {sentence}", markup=False)
    return 1 if wrong else 0


if __name__ == "__main__":
    typer.run(main)
