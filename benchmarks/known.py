"""A whole run on a base with random weights: done in a process of its own, and accounted for again here."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import shapes
from benchmarks.runs import Run
from lowres_ft import bases, batches, data, memory, profiles
from lowres_ft.bases import Base
from lowres_ft.batches import Reader
from lowres_ft.course import Course
from lowres_ft.memory import Memory
from lowres_ft.plan import Plan
from lowres_ft.profiles import Profile
from lowres_ft.recipe import Recipe
from lowres_ft.simulate import Account
from lowres_ft.tokenizing import load_tokenizer

_ROWS = 1000


def done(run: Run, work: Path) -> Path:
    """The folder of a run's bundle; one that lies in the folder of work already is not run again."""
    base, rows = work / run.shape, work / f"{run.task}-{run.length}.jsonl"
    if not base.exists():
        shapes.write_base(run.shape, base)
    if not rows.exists():
        shapes.write_rows(rows, run.task, run.length, _ROWS)
    out = work / run.key
    if not out.exists():
        job = [str(base), str(rows), run.task, str(run.length), str(out), *run.settings]
        subprocess.run([sys.executable, "-m", "benchmarks.whole", *job], check=True)
    return out


@dataclass(frozen=True)
class Known:
    """A run that lies in the folder of work, and what it is accounted for by."""

    run: Run
    report: dict[str, Any]
    steps: list[float]
    """Seconds of each."""
    probed: int
    """Bytes that it held at most when its probe was done."""
    recipe: Recipe
    base: Base
    profile: Profile
    plan: Plan
    course: Course

    @classmethod
    def of(cls, run: Run, work: Path) -> "Known":
        """A run, done if it was not."""
        folder = done(run, work)
        report = json.loads((folder / "report.json").read_bytes())
        told = {name: value for name, value in report["plan"].items() if name in Plan.model_fields}
        told["attention_kernels"] = {int(length): kernel for length, kernel in told["attention_kernels"].items()}
        plan = Plan.model_validate(told)
        rows = work / f"{run.task}-{run.length}.jsonl"
        recipe = shapes.recipe(work / run.shape, rows, run.task, run.length, *run.settings)
        base = bases.resolve(recipe.model)
        with TemporaryDirectory() as room:
            recipe, course = _course(recipe, base, plan, Path(room))
        lines = [json.loads(line) for line in (work / f"{run.key}.jsonl").read_text().splitlines()]
        steps = [one["seconds"] for one in lines if "seconds" in one]
        probed = next(one["peak"] for one in lines if one.get("stage", "").startswith("training"))
        return cls(run, report, steps, probed, recipe, base, profiles.profile(base, recipe.task), plan, course)

    @property
    def told(self) -> tuple[Memory, Account]:
        """What is told of its memory, and the account of the micro-batch that needs most."""
        course = self.course
        return memory.estimate(
            self.recipe, self.base, self.profile, self.plan, course.micro_batches, goes_on=course.goes_on
        )

    @property
    def peak(self) -> int:
        """Bytes that it held at most."""
        return int(self.report["measured"]["peak_bytes"])


def _course(recipe: Recipe, base: Base, plan: Plan, room: Path) -> tuple[Recipe, Course]:
    """A recipe with its labels, and its steps."""
    rows = data.load(recipe, room)
    tokenizer = load_tokenizer(base.folder)
    rows.task.prepare(tokenizer)
    reader = Reader(rows.task, tokenizer)
    tokens = {name: batches.tokenize(reader, split, room / name) for name, split in rows.splits().items()}
    recipe = recipe.model_copy(update={"task": rows.task})
    return recipe, Course.of(recipe, plan, tokens)
