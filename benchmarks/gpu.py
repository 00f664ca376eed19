"""`python benchmarks/gpu.py`: lowres-ft and Trainer + PEFT + bitsandbytes on one GPU, without a network and data.

It makes the shapes of well-known models with random weights on the GPU, trains LoRA on random tokens and tells of each
way, in a process of its own, tokens/s, peak memory and losses; and what still fits where it may have less memory.
Cells that the file `--out` holds already are not measured again. This process imports nothing that is not Python's own.
Not yet run on a GPU.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
if str(_ROOT) not in sys.path:  # run as a file, it does not stand beside its parts
    sys.path.insert(0, str(_ROOT))

from benchmarks.on_gpu import table  # noqa: E402
from benchmarks.on_gpu.cells import SHAPES, Cell, Job, Way, cells  # noqa: E402

_RESULTS = Path(__file__).parent / "results"
_COMPUTES = (
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "pydantic",
    "yaml",
    "filelock",
)
_TOLD = 2000  # characters of a failure
_FIRST = 30.0  # seconds that a process is expected to take before one is known

Found = dict[str, Any]


@dataclass(frozen=True)
class Session:
    """How cells are measured."""

    device: str
    tiny: bool
    warmup: int
    steps: int
    until: float | None
    """When to stop, by `time.monotonic`."""

    @property
    def left(self) -> float | None:
        """Seconds; None for as many as it takes."""
        return None if self.until is None else self.until - time.monotonic()

    def jobs(self, cell: Cell) -> list[Job]:
        """The ways of a cell that this version of lowres_ft has, each once."""
        options = (self.device, self.tiny, self.warmup, self.steps)
        jobs = [Job(cell.shape, cell.numbers, cell.length, way, cell.cap, *options) for way in cell.ways if has(way)]
        return list({job.key: job for job in reversed(jobs)}.values())[::-1]

    def child(self, job: Job) -> Found:
        """What a process of its own found, or what went wrong.

        Raises:
            TimeoutExpired: The time is up.
        """
        with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
            out = Path(folder) / "found.json"
            command = [sys.executable, "-m", "benchmarks.on_gpu.measure", json.dumps(asdict(job)), "--out", str(out)]
            environment = {"HF_HUB_OFFLINE": "1", "LOWRES_FT_CACHE": folder, **os.environ, "PYTHONPATH": _path()}
            done = subprocess.run(
                command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False, timeout=self.left
            )
            if done.returncode:
                return {"error": (done.stderr.strip() or f"exit {done.returncode}")[-_TOLD:]}
            found: Found = json.loads(out.read_text(encoding="utf-8"))
            return found


def _path() -> str:
    return os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def has(way: Way) -> bool:
    """Whether this version of lowres_ft has what a way needs."""
    return all((_ROOT / "lowres_ft" / f"{name}.py").is_file() for name in way.needs)


def lacking(cell: Cell) -> list[str]:
    """Modules that a cell needs and that are not installed."""
    first = cell.ways[0]
    needed = [*_COMPUTES, *["bitsandbytes"] * (cell.numbers != "bf16"), *["peft"] * (first.family == "trainer")]
    needed += ["triton"] * (first.kernel == "triton")
    return [name for name in needed if importlib.util.find_spec(name) is None]


def measure(wanted: Sequence[Cell], session: Session, record: Found) -> Iterator[str]:
    """Measure cells that the record does not hold, and say of each what came of it."""
    longest = _FIRST
    for at, cell in enumerate(wanted):
        if "error" not in record["cells"].get(cell.key, {"error": ""}):
            continue
        if missing := lacking(cell):
            yield f"{cell.key}: skipped, as there is no {', '.join(missing)}"
            continue
        if session.left is not None and session.left < longest:
            yield f"time is up; {len(wanted) - at} cells are left or were looked at already: run it again to go on"
            return
        began = time.monotonic()
        try:
            found = _ladder(cell, session, record)
        except subprocess.TimeoutExpired:
            yield f"{cell.key}: time is up; run it again to go on"
            return
        if found is None:
            yield f"{cell.key}: skipped, as this version of lowres_ft has no {', '.join(cell.ways[0].needs)}"
            continue
        longest = max(longest, time.monotonic() - began)
        record["machine"] = found.pop("machine", record["machine"])
        named = {"shape": cell.shape, "numbers": cell.numbers, "length": cell.length, "cap": cell.cap}
        record["cells"][cell.key] = {"way": cell.ways[0].name} | found | named
        yield f"{cell.key}: {told(found)} ({time.monotonic() - began:.0f} s)"


def _ladder(cell: Cell, session: Session, record: Found) -> Found | None:
    """Try the ways of a cell in turn until one fits; None where there is none to try."""
    jobs = session.jobs(cell)
    if not jobs:
        return None
    found: Found = {"fits": False, "way": cell.ways[0].name, "at": "weights"}
    tried: list[dict[str, str]] = []
    if larger := _too_small(cell, record):
        return found | {"tried": tried, "at": f"as in {larger:g} GiB"}
    for job in jobs:
        if any(one["at"] == "weights" and one["embeddings"] == str(job.way.embeddings) for one in tried):
            continue  # the same weights
        if _beyond(job, record):
            found = found | {"way": job.way.name, "at": "peak without a cap"}
        else:
            found = session.child(job)
            if "error" in found or found["fits"]:
                return found | {"tried": tried}
        tried.append({"way": job.way.name, "at": found["at"], "embeddings": str(job.way.embeddings)})
    return found | {"tried": tried}


def _too_small(cell: Cell, record: Found) -> float | None:
    """A larger cap in which nothing fitted."""
    for one in record["cells"].values():
        same = all(one[name] == getattr(cell, name) for name in ("shape", "numbers", "length"))
        same = same and one["way"].split()[0] == cell.ways[0].family
        same = same and ("passing" in one["way"]) == cell.ways[0].passing
        if same and cell.cap and (one["cap"] or 0) > cell.cap and not one.get("fits", True):
            return float(one["cap"])
    return None


def _beyond(job: Job, record: Found) -> bool:
    """Whether the same way took more without a cap than the cap allows."""
    free = record["cells"].get(Cell(job.shape, job.numbers, job.length, (job.way,)).key, {})
    return job.cap is not None and free.get("memory", 0) + free.get("context", 0) > job.cap * 2**30


def told(found: Found) -> str:
    """A few words on what was found."""
    if "error" in found:
        return f"failed: {found['error'].splitlines()[-1]}"
    if "products" in found:
        return f"{len(found['products'])} products"
    if not found["fits"]:
        return f"OOM ({found['at']})"
    return f"{found['way']}, {found['tokens/s']:,.0f} tokens/s, {found['memory'] / 2**30:.2f} GiB"


def main() -> int:
    given = _arguments()
    out = given.out or _RESULTS / f"gpu-{datetime.now(UTC):%Y-%m-%d-%H%M}.json"
    record: Found = {"format": 1, "tiny": given.tiny, "machine": None, "cells": {}}
    if out.is_file():
        record = json.loads(out.read_text(encoding="utf-8"))
        if record["tiny"] != given.tiny and not given.show:
            sys.exit(f"error: {out} is of {'tiny' if record['tiny'] else 'whole'} models")
    if not given.show:
        until = None if given.time_limit is None else time.monotonic() + given.time_limit
        session = Session(given.device, given.tiny, given.warmup, given.steps, until)
        caps = None if given.cap is None else tuple(cap or None for cap in given.cap)
        for line in measure(cells(tuple(given.shapes), caps, few=given.few), session, record):
            print(line, flush=True)
            _write(record, out)
        print(f"\nwritten to {out}\n")
    for line in table.lines(record):
        print(line)
    return 1 if any(table.wrong(record)) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--few", action="store_true", help="the essential cells alone; they come first anyway")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all")
    parser.add_argument(
        "--cap", type=float, nargs="+", metavar="GIB", help="measure in so many GiB alone; 0 for no cap"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the record; one that is there is gone on with")
    parser.add_argument("--show", action="store_true", help="print the tables of --out; measure nothing")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop before a cell that would pass it")
    parser.add_argument("--warmup", type=int, default=3, metavar="STEPS")
    parser.add_argument("--steps", type=int, default=10, help="timed ones")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to test the benchmark")
    return parser.parse_args()


def _write(record: Found, out: Path) -> None:
    """Write what there is, after each cell, so that a run that is stopped has not been in vain."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1), encoding="utf-8")
    part.replace(out)


if __name__ == "__main__":
    sys.exit(main())
