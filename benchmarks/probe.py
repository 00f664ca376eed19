"""How well memory and time are known before a run and after its probe: `python -m benchmarks.probe [--out FILE]`.

Each run of `runs.JUDGED` is `lowres_ft.run` in a process of its own, begun as a command is (`allocator.restart`), on a
base with random weights; its report holds what was told before weights were read, what the probe made of that, and what
was measured. Time counts, and memory is given back by the clock, so nothing else may run.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.known import done
from benchmarks.runs import JUDGED, Run
from lowres_ft import allocator, device, files

_FIGURES = ("memory_bytes", "seconds")


def record(run: Run, report: dict[str, Any]) -> dict[str, Any]:
    """What was told, what the probe made of it, and what was measured."""
    plan, took = report["plan"], report["measured"]
    truth = {"memory_bytes": took["peak_bytes"], "seconds": took["train_seconds"]}
    found: dict[str, Any] = {"run": run.name, "measured": truth}
    for when, said in (("told", plan), ("probed", plan["probe"])):
        found[when] = {name: said[name] for name in _FIGURES}
        found[f"{when}_error"] = {name: said[name] / truth[name] - 1 for name in _FIGURES}
    return found


def _show(found: list[dict[str, Any]]) -> None:
    print(f"{'':<86} {'memory':^26} {'time':^26}")
    print(f"{'run':<86} {'measured':>9} {'told':>8} {'probed':>8} {'measured':>9} {'told':>8} {'probed':>8}")
    for one in found:
        memory, seconds = one["measured"]["memory_bytes"] / 1e6, one["measured"]["seconds"]
        errors = [f"{one[f'{when}_error'][name]:>+8.1%}" for name in _FIGURES for when in ("told", "probed")]
        print(f"{one['run']:<86} {memory:>6.0f} MB {errors[0]} {errors[1]} {seconds:>7.1f} s {errors[2]} {errors[3]}")
    for what, chosen in (("median", statistics.median), ("worst", max)):
        values = [
            chosen([abs(one[f"{when}_error"][name]) for one in found])
            for name in _FIGURES
            for when in ("told", "probed")
        ]
        print(f"{what:<86} {'':>9} {values[0]:>8.1%} {values[1]:>8.1%} {'':>9} {values[2]:>8.1%} {values[3]:>8.1%}")


def main() -> None:
    allocator.restart()
    parser = argparse.ArgumentParser(description="Memory and time, told, probed and measured.")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/whole"), help="Where bases and runs lie.")
    parser.add_argument("--out", type=Path, help="Where to write the record.")
    parser.add_argument("--only", default="", help="Runs whose name holds this.")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    runs = [run for run in JUDGED if given.only in run.name]
    found = [record(run, json.loads((done(run, given.work) / "report.json").read_bytes())) for run in runs]
    _show(found)
    if given.out:
        files.write_json(given.out, {"versions": device.versions(), "runs": found})


if __name__ == "__main__":
    main()
