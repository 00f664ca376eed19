"""How well memory and time are known before a run and after its probe: `python -m benchmarks.probe [--out FILE]`.

Each run is `lowres_ft.run` in a process of its own, on a base with random weights; its report holds what was told
before weights were read, what the probe made of that, and what was measured. Time counts, so nothing else may run.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import shapes
from benchmarks.memory_runs import Run
from lowres_ft import device, files

_ROWS = 1500
_INT8, _NF4 = "model.quantize=int8", "model.quantize=nf4"
_RUNS = (
    Run("minilm", "classification", 96, ("train.steps=40", "method.rank=8")),
    Run("minilm", "ner", 32, ("train.steps=120",)),
    Run("bert-mini", "classification", 256, ("train.steps=40",)),
    Run("bert-mini", "classification", 64, ("train.steps=100", "method={kind: full}")),
    Run("bert-base", "classification", 48, ("train.steps=20", _INT8)),
    Run("distilbert", "classification", 128, ("train.steps=20", "train.batch_size=16")),
    Run("roberta-small", "classification", 64, ("train.steps=30", "method={kind: dora}")),
    Run("roberta-small", "ner", 128, ("train.steps=20", _NF4)),
    Run("xlm-r-minilm", "classification", 128, ("train.steps=20",)),
    Run("modernbert-small", "classification", 128, ("train.steps=20",)),
    Run("deberta-small", "classification", 64, ("train.steps=20",)),
    Run("llama-small", "chat", 128, ("train.steps=20", _INT8)),
    Run("llama-small", "classification", 64, ("train.steps=40",)),
    Run("smollm2", "chat", 64, ("train.steps=12", "train.batch_size=8")),
    Run("qwen3-small", "chat", 64, ("train.steps=12", _NF4, "train.batch_size=16")),
    Run("minilm", "classification", 256, ("train.steps=20", "budget.recompute=layers")),
)
RUNS = tuple(replace(run, dtype="auto") for run in _RUNS)  # as users leave it
_FIGURES = ("memory_bytes", "seconds")


def measured(run: Run, work: Path) -> dict[str, Any]:
    """The report of a run; one that lies in the folder of work already is not run again."""
    base, rows = work / run.shape, work / f"{run.task}-{run.length}-{_ROWS}.jsonl"
    if not base.exists():
        shapes.write_base(run.shape, base)
    if not rows.exists():
        shapes.write_rows(rows, run.task, run.length, _ROWS)
    out = work / run.key
    if not out.exists():
        job = [str(base), str(rows), run.task, str(run.length), str(out), *run.settings]
        subprocess.run([sys.executable, "-m", "benchmarks.probe", "--job", *job], check=True)
    found: dict[str, Any] = json.loads((out / "report.json").read_bytes())
    return found


def record(run: Run, report: dict[str, Any]) -> dict[str, Any]:
    """What was told, what the probe made of it, and what was measured."""
    plan, took = report["plan"], report["measured"]
    truth = {"memory_bytes": took["peak_bytes"], "seconds": took["train_seconds"]}
    found: dict[str, Any] = {"run": run.name, "measured": truth}
    for when, said in (("told", plan), ("probed", plan["probe"])):
        found[when] = {name: said[name] for name in _FIGURES}
        found[f"{when}_error"] = {name: said[name] / truth[name] - 1 for name in _FIGURES}
    return found


def _work(job: list[str]) -> None:
    from lowres_ft import deferred

    deferred.begin()  # as the command line does
    import lowres_ft

    base, rows, task, length, out, *changes = job
    lowres_ft.run(shapes.recipe(Path(base), Path(rows), task, int(length), *changes), out)


def _show(found: list[dict[str, Any]]) -> None:
    print(f"{'':<66} {'memory':^26} {'time':^26}")
    print(f"{'run':<66} {'measured':>9} {'told':>8} {'probed':>8} {'measured':>9} {'told':>8} {'probed':>8}")
    for one in found:
        memory, seconds = one["measured"]["memory_bytes"] / 1e6, one["measured"]["seconds"]
        errors = [f"{one[f'{when}_error'][name]:>+8.1%}" for name in _FIGURES for when in ("told", "probed")]
        print(f"{one['run']:<66} {memory:>6.0f} MB {errors[0]} {errors[1]} {seconds:>7.1f} s {errors[2]} {errors[3]}")
    for what, chosen in (("median", statistics.median), ("worst", max)):
        values = [
            chosen([abs(one[f"{when}_error"][name]) for one in found])
            for name in _FIGURES
            for when in ("told", "probed")
        ]
        print(f"{what:<66} {'':>9} {values[0]:>8.1%} {values[1]:>8.1%} {'':>9} {values[2]:>8.1%} {values[3]:>8.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time, told, probed and measured.")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/probe"))
    parser.add_argument("--out", type=Path, help="Where to write the record.")
    parser.add_argument("--only", default="", help="Runs whose name holds this.")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        _work(given.job)
        return
    given.work.mkdir(parents=True, exist_ok=True)
    found = [record(run, measured(run, given.work)) for run in RUNS if given.only in run.name]
    _show(found)
    if given.out:
        files.write_json(given.out, {"versions": device.versions(), "runs": found})


if __name__ == "__main__":
    main()
