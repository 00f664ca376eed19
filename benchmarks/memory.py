"""How well memory is known before a run: `python -m benchmarks.memory [--fit] [--dtype D] [--work F] [--out FILE]`.

Each run of `memory_runs` trains a base with random weights for a few steps, in a process of its own, whose peak is
compared with what the plan said. `--fit` first finds, on the runs that are for it, what a process takes beside its
tensors, and writes it to `lowres_ft/tables/memory.json`; the others judge. Only memory counts, so it may run while
others use the processor. Runs whose results lie in the folder of work are not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import shapes
from benchmarks.memory_runs import FITTED, JUDGED, Run
from lowres_ft import bases, device, files, memory, profiles
from lowres_ft.bases import Base
from lowres_ft.memory import Memory
from lowres_ft.pace import Shape
from lowres_ft.plan import Plan
from lowres_ft.profiles import Profile
from lowres_ft.recipe import Recipe
from lowres_ft.simulate import Account

_ROWS = 400
_TABLE = Path(memory.__file__).parent / "tables" / "memory.json"


@dataclass(frozen=True)
class Result:
    """A run, what was told of it, and what it took."""

    run: Run
    told: Memory
    in_heap: float
    """Most bytes that a micro-batch has in the heap."""
    mapped: bool
    """Whether large tensors were mapped by themselves."""
    single: bool
    """Whether the weights were held in fp32."""
    measured: int

    @property
    def error(self) -> float:
        """Of what was told, as a share of what was measured."""
        return self.told.total / self.measured - 1

    def to_json(self) -> dict[str, Any]:
        """For the record."""
        told = self.told.to_json()
        return {"run": self.run.name, "told": told, "measured": self.measured, "error": self.error}


def result(run: Run, work: Path) -> Result:
    """Measure a run, if it was not, and tell its memory."""
    base = work / run.shape
    if not base.exists():
        shapes.write_base(run.shape, base)
    rows = work / f"{run.task}-{run.length}.jsonl"
    if not rows.exists():
        shapes.write_rows(rows, run.task, run.length, _ROWS)
    out = work / f"{run.key}.json"
    if not out.exists():
        job = {"base": str(base), "rows": str(rows), "task": run.task, "length": run.length, "changes": run.settings}
        place = work / f"{run.key}.job.json"
        place.write_text(json.dumps(job | {"out": str(out)}), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "benchmarks.resident", str(place)], check=True)
    known = Known.of(run, work)
    told, account = known.estimate()
    return Result(
        run=run,
        told=told,
        in_heap=memory.in_heap(account, known.profile, known.plan, known.cut),
        mapped=memory.is_mapped(known.profile, known.plan),
        single=memory.holds_single(known.recipe, known.plan),
        measured=int(known.found["stages"]["trained"]["peak"]),
    )


@dataclass(frozen=True)
class Known:
    """A run that lies in the folder of work, and what it is accounted for by."""

    found: dict[str, Any]
    """What `resident` wrote."""
    recipe: Recipe
    base: Base
    profile: Profile
    plan: Plan

    @classmethod
    def of(cls, run: Run, work: Path) -> "Known":
        """Read what was measured of a run."""
        found = json.loads((work / f"{run.key}.json").read_bytes())
        kernels = {int(length): kernel for length, kernel in found["plan"]["attention_kernels"].items()}
        plan = Plan.model_validate(found["plan"] | {"attention_kernels": kernels})
        rows = work / f"{run.task}-{run.length}.jsonl"
        recipe = shapes.recipe(work / run.shape, rows, run.task, run.length, *run.settings)
        base = bases.resolve(recipe.model)
        return cls(found, recipe, base, profiles.profile(base, recipe.task), plan)

    @property
    def cut(self) -> list[Shape]:
        """The shapes of its micro-batches."""
        return [(rows, width) for rows, width in self.found["micro_batches"]]

    def estimate(self) -> tuple[Memory, Account]:
        """What is told of its memory, and the account of the micro-batch that needs most."""
        return memory.estimate(self.recipe, self.base, self.profile, self.plan, self.cut)


def fit(results: list[Result], imported: int) -> dict[str, Any]:
    """Least squares of relative errors: the constants of a processor, large tensors mapped or in the heap."""
    tensors = [
        sum(size for name, size in one.told.terms.items() if name not in ("libraries", "allocator")) for one in results
    ]
    rest = np.array([one.measured - imported - size for one, size in zip(results, tensors, strict=True)])
    columns = np.array(
        [[1.0, not one.single, one.in_heap * one.mapped, one.in_heap * (not one.mapped)] for one in results]
    )
    weights = 1 / np.array([one.measured for one in results])
    code, sixteen, *kept = np.linalg.lstsq(columns * weights[:, None], rest * weights, rcond=None)[0]
    shared = {"libraries": imported, "model_code": round(code)}
    if not all(one.single for one in results):  # else none tells of 16 bits
        shared["sixteen"] = round(sixteen)
    return {
        name: shared | {"fragmentation": round(float(of), 3)} for name, of in zip(("cpu", "heap"), kept, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory that was told, beside memory that was measured.")
    parser.add_argument("--fit", action="store_true", help="Fit the constants first, and write them.")
    parser.add_argument(
        "--work", type=Path, default=Path("benchmarks/work/memory"), help="Where bases and results lie."
    )
    parser.add_argument("--out", type=Path, help="Where to write the record.")
    parser.add_argument("--known", action="store_true", help="Take only runs that lie in the folder of work already.")
    parser.add_argument("--dtype", help="In which all runs compute, not each in its own; `auto` is what is fast here.")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    fitted, judged = (
        [run for run in runs if not given.known or (given.work / f"{run.key}.json").exists()]
        for runs in ([replace(run, dtype=given.dtype or run.dtype) for run in runs] for runs in (FITTED, JUDGED))
    )
    if given.fit:
        table = json.loads(_TABLE.read_text(encoding="utf-8"))
        results = [result(run, given.work) for run in fitted]
        read = [json.loads((given.work / f"{run.key}.json").read_text())["stages"]["read"]["now"] for run in fitted]
        found = fit(results, round(statistics.median(read)))
        files.write_json(_TABLE, table | {kind: table[kind] | constants for kind, constants in found.items()})
    record = []
    for name, runs in filter(itemgetter(1), (("fitted", fitted), ("judged", judged))):
        results = [result(run, given.work) for run in runs]
        print(f"{name:<76} {'told':>8} {'measured':>8}  error")
        for one in results:
            print(f"{one.run.name:<76} {one.told.total / 1e6:>6.0f}MB {one.measured / 1e6:>6.0f}MB  {one.error:+.1%}")
        errors = [abs(one.error) for one in results]
        print(f"{'':<76} median {statistics.median(errors):.1%}, worst {max(errors):.1%}")
        record += [one.to_json() | {"for": name} for one in results]
    if given.out:
        files.write_json(given.out, {"versions": device.versions(), "runs": record})


if __name__ == "__main__":
    main()
