"""One run in a process of its own, and what memory it held: `python -m benchmarks.resident JOB.json`.

It prepares, trains a few steps and evaluates as `lowres-ft recipe` does up to the point where the run's peak is read.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any


def status() -> dict[str, int]:
    """What Linux says of this process's memory, in bytes: VmRSS now, VmHWM at most."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.endswith(" kB"))
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in lines}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train a recipe; return the memory after each stage, resident and at most so far, and the seconds of each step.

    The plan is the one before the probe, by which memory is told.
    """
    from lowres_ft import deferred

    deferred.begin()  # as the command line does
    from benchmarks import shapes
    from lowres_ft import data, device, evaluate, preparing, train
    from lowres_ft.course import Course
    from lowres_ft.events import unheard
    from lowres_ft.runs import run_folder

    found: dict[str, Any] = {"imported": status()}
    machine = device.find("cpu")
    changes = (job["task"], job["length"], *job["changes"])
    recipe = shapes.recipe(Path(job["base"]), Path(job["rows"]), *changes)
    with tempfile.TemporaryDirectory() as folder, run_folder("memory", Path(folder) / "out", machine) as place:
        rows = data.load(recipe, place.work)
        resolved = recipe.model_copy(update={"task": rows.task})
        found["read"] = status()
        ready = preparing.prepare(resolved, rows, machine, place)
        found["loaded"] = status()
        plan, course = ready.plan, Course.of(resolved, ready.plan, ready.tokens)
        ready = preparing.tried(ready, machine, place, unheard)
        found["tried"] = status()
        state = train.start(resolved, ready.adapted, ready.tokens["train"], ready.plan)
        seconds = []
        for step in train.train(state, ready.tokens["train"], ready.plan, machine):
            seconds.append(step.seconds)
            if step.number == state.total // 2:  # a run goes on beside a copy of its best tensors
                evaluate.outputs(ready.adapted, ready.tokens["validation"], ready.plan)
                state.record(0.0)
        found["trained"] = status()
        done = Course.of(resolved, ready.plan, ready.tokens)
    return {
        "stages": {name: {"now": held["VmRSS"], "peak": held["VmHWM"]} for name, held in found.items()},
        "plan": plan.model_dump(mode="json"),
        "micro_batches": course.micro_batches,
        "typical": course.typical,
        "steps": list(zip(done.sample, seconds, strict=True)),
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(job["out"]).write_text(json.dumps(measure(job)), encoding="utf-8")


if __name__ == "__main__":
    main()
