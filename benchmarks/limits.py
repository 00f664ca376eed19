"""A run in 60 % of the memory that it takes by itself: `python -m benchmarks.limits [--share 0.6] [--out FILE]`.

Each recipe runs twice, each time in a process of its own: as it is, and with `budget.memory` at that share of the first
run's peak. The second is held to it from outside too, in two ways. The system refuses it more data than that
(RLIMIT_DATA), as it would after `ulimit -d`. And this process looks at the child's peak of resident memory (VmHWM)
every 10 ms, and where the child has children of its own, at what all of them hold together, shared pages counted once;
above the limit it kills it. Both are compared loss by loss. A recipe of which the libraries alone need more than the
share is refused, which is told as it is. This process imports nothing heavy.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lowres_ft import files, least
from lowres_ft.sizes import show_bytes

_EVERY = 0.01  # seconds between looks at a child
RECIPES: dict[str, tuple[str, ...]] = {
    "reviews": ("sentiment-lora", "train.steps=100"),
    "long reviews": (
        *("sentiment-lora", "data.train=starter:imdb", "data.limit=2000", "task.max_length=512", "train.steps=20"),
        *("data.validation=0.01", "data.test=0.01", "model.dtype=float32"),
    ),
    "chat": ("chat-lora-int8", "train.steps=40", "task.control=null", "task.samples=0"),
}


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    code: int
    killed: bool
    """From outside, above the limit."""
    peak: int
    """Bytes resident at most, by looks at it and its children every 10 ms."""
    seconds: float
    error: str
    report: dict[str, Any] | None

    @property
    def losses(self) -> list[float]:
        """Of each step."""
        return [] if self.report is None else [loss for _, loss in self.report["curves"]["loss"]]


def watched(arguments: Sequence[str], most: int | None = None) -> Outcome:
    """Run a recipe in a process of its own, which gets no more than `most` bytes and is killed when it holds more."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bundle"
        command = [sys.executable, "-m", "lowres_ft", "recipe", *arguments, "--device", "cpu", "--out", str(out)]
        began, killed, peak = time.monotonic(), False, 0
        with (Path(folder) / "stderr").open("w+") as told:
            child = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=told,
                preexec_fn=None if most is None else partial(_hold, most),
            )
            while child.poll() is None:
                peak = max(peak, _held(child.pid))
                if most is not None and not killed and peak > most:
                    killed = True
                    child.kill()
                time.sleep(_EVERY)
            told.seek(0)
            lines = told.read().splitlines()
        report = json.loads((out / "report.json").read_text()) if child.returncode == 0 else None
    error = "\n".join(line for line in lines if line.startswith(("error:", "hint:")))
    return Outcome(child.returncode, killed, peak, time.monotonic() - began, error, report)


def _hold(most: int) -> None:
    """Let this process, and those that it begins, have no more data than `most` bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _held(pid: int) -> int:
    """Bytes that a process has held at most, or holds with its children now if that is more; 0 where it has ended."""
    alone = 0
    try:
        alone = _figure(Path(f"/proc/{pid}/status"), "VmHWM:")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        family = [pid, *map(int, children)] if children else []
        return max(alone, sum(_figure(Path(f"/proc/{one}/smaps_rollup"), "Pss:") for one in family))
    except OSError:  # one of them ended meanwhile
        return alone


def _figure(path: Path, name: str) -> int:
    """Bytes that a file of the system tells under a name; 0 where it does not."""
    lines = path.read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def compare(arguments: Sequence[str], share: float) -> dict[str, Any]:
    """A recipe as it is, and within a share of what that took."""
    free = watched(arguments)
    if free.report is None:
        raise RuntimeError(f"{' '.join(arguments)} fails without a bound: {free.error}")
    limit = int(share * free.peak)
    held = watched([*arguments, f"budget.memory={limit}B"], limit)
    pairs = list(zip(free.losses, held.losses, strict=True)) if held.report else []
    return {
        "arguments": list(arguments),
        "limit_bytes": limit,
        "enforced": "from outside: RLIMIT_DATA, and a watcher that kills above it (VmHWM; with its children Pss)",
        "free": _told(free),
        "held": _told(held),
        "steps": len(pairs),
        "largest_relative_difference": max((abs(a - b) / abs(a) for a, b in pairs), default=None),
        "last_losses": list(pairs[-1]) if pairs else None,
    }


def _told(outcome: Outcome) -> dict[str, Any]:
    """For the record, with the plan in the place of the whole report."""
    found = {name: value for name, value in asdict(outcome).items() if name != "report"}
    report = outcome.report or {"plan": None, "measured": {"tokens_per_second": None}, "notes": []}
    notes = [note for note in report["notes"] if "memory ran out" in note]
    return found | {
        "plan": report["plan"],
        "tokens_per_second": report["measured"]["tokens_per_second"],
        "notes": notes,
    }


def _line(name: str, found: dict[str, Any]) -> str:
    free, held, worst = found["free"], found["held"], found["largest_relative_difference"]
    told = f"losses within {worst:.1e} over {found['steps']} steps" if worst is not None else held["error"]
    return (
        f"{name:<14} {show_bytes(free['peak']):>9} {show_bytes(found['limit_bytes']):>9} "
        f"{show_bytes(held['peak']):>9}  exit {held['code']}{', killed' if held['killed'] else ''}  {told}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs in a share of the memory that they take by themselves.")
    parser.add_argument("--share", type=float, default=0.6, help="Of the peak without a bound.")
    parser.add_argument("--only", nargs="*", choices=RECIPES, default=list(RECIPES), help="Some of the recipes.")
    parser.add_argument("--out", type=Path, help="Where to write the record.")
    given = parser.parse_args()
    print(f"{'':<14} {'free':>9} {'limit':>9} {'held':>9}", flush=True)
    runs = {}
    for name in given.only:
        runs[name] = compare(RECIPES[name], given.share)
        print(_line(name, runs[name]), flush=True)
        if given.out:
            files.write_json(given.out, {"share": given.share, "floor_bytes": least.libraries("cpu"), "runs": runs})


if __name__ == "__main__":
    main()
