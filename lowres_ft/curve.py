"""How much data does a recipe need? Trained at several sizes and seeds, and what more rows would bring."""

import io
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lowres_ft import (
    bases,
    batches,
    behaviour,
    budget,
    data,
    device,
    evaluate,
    files,
    fitting,
    model,
    pipeline,
    powerlaw,
    preparing,
    shortage,
    splits,
)
from lowres_ft import plan as plans
from lowres_ft.bases import Base
from lowres_ft.batches import Tokens
from lowres_ft.data import Data, Rows
from lowres_ft.device import Machine
from lowres_ft.errors import DataError, LowresError, OutputError
from lowres_ft.events import Fetching, Listener, Note, Stage, unheard
from lowres_ft.fitting import Ready
from lowres_ft.model import Adapted
from lowres_ft.plan import Plan
from lowres_ft.powerlaw import Estimate, Law, Point
from lowres_ft.profiles import Profile
from lowres_ft.recipe import Recipe
from lowres_ft.splits import Keys
from lowres_ft.tasks.base import Seen, Task

SIZES = 5
SEEDS = 3
_LEAST = 16  # rows of the smallest size
_USEFUL = 0.005  # gain that is worth a word: half a point
_VAGUE = 0.06  # width of an interval that says too little


@dataclass(frozen=True)
class Score:
    """The score on test of one run."""

    size: int
    seed: int
    value: float
    low: float
    high: float
    """Ends of its 95 % bootstrap interval over test rows."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Scores by size, and the law that was fitted to them."""

    metric: str
    higher_is_better: bool
    scores: tuple[Score, ...]
    law: Law
    hidden: "Hidden"

    @property
    def points(self) -> list[Point]:
        """The scores of each size, smallest first."""
        return points(self.scores)

    @property
    def largest(self) -> int:
        """The largest size that was trained at."""
        return max(score.size for score in self.scores)

    @property
    def doubling(self) -> Estimate:
        """How much better the mean score would be with twice the rows."""
        return self.law.gain(self.largest, 2 * self.largest)

    def told(self) -> str:
        """What doubling the data would bring, in words."""
        gain, n = self.doubling, self.largest
        useful = _USEFUL if self.higher_is_better else _USEFUL * abs(self.points[-1].scores[0])
        what = f"from {n:,} to {2 * n:,} training rows"
        interval = f"{gain.value:.3f} [{gain.low:.3f}, {gain.high:.3f}]"
        if gain.low < useful <= gain.high or gain.width > _VAGUE:
            return f"cannot tell whether doubling {what} is worth it: {self.metric} better by {interval}"
        if gain.high < useful:
            return f"doubling {what} would bring little: {self.metric} better by {interval}"
        return f"doubling {what} would make {self.metric} better by {interval}"

    def to_json(self) -> dict[str, Any]:
        """All figures, as other programs read them."""
        return {
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "scores": [asdict(score) for score in self.scores],
            "law": self.law.parameters,
            "curve": [{"size": point.size, **asdict(self.law.curve(point.size))} for point in self.points],
            "doubling": {"from": self.largest, "to": 2 * self.largest, **asdict(self.doubling)},
            "hidden": asdict(self.hidden),
            "told": self.told(),
        }


@dataclass(frozen=True)
class Hidden:
    """The largest size, predicted from the others."""

    size: int
    mean: float
    """Of the scores that were measured there."""
    predicted: Estimate
    """The same, by the fit to the smaller sizes."""
    inside: bool
    """Whether the mean lies within the interval."""


def measure(
    recipe: Recipe,
    work: Path,
    *,
    sizes: Sequence[int] | None = None,
    seeds: int = SEEDS,
    device_name: str = "auto",
    known: Sequence[Score] = (),
    listen: Listener = unheard,
    heard: Callable[[Score], None] = lambda score: None,
) -> tuple[Score, ...]:
    """Train at each size with each seed, and score on the same test rows; scores that are `known` are kept.

    Rows, their split and their tokens are those of the recipe's seed. A seed decides which rows a size has (those of
    a smaller size are among those of a larger one), the order, the new weights and the dropout.

    Raises:
        LowresError: The recipe cannot be run, or has no test rows or too few rows for the sizes.
    """
    setting = _Setting.of(recipe, work, device_name, listen)
    total = len(setting.rows.train)
    wanted = (
        require_sizes(sizes, total) if sizes else powerlaw.require_enough(spread(total, len(setting.rows.task.names)))
    )
    found = {(score.size, score.seed): score for score in known}
    with pipeline.bounded(setting.resolved, setting.machine, listen):
        for seed in range(recipe.train.seed, recipe.train.seed + seeds):
            for score in _scores(setting, seed, [size for size in wanted if (size, seed) not in found], listen):
                found[score.size, score.seed] = score
                heard(score)
    return tuple(found[key] for key in sorted(found) if key[0] in wanted)


def _scores(setting: "_Setting", seed: int, sizes: Sequence[int], listen: Listener) -> Iterator[Score]:
    """Yield the score of each size with a seed; the model of one seed is gone before the next one's is loaded."""
    if not sizes:
        return
    listen(Stage(f"seed {seed}: loading {setting.recipe.model.base}"))
    trainer = _Trainer.of(setting, seed)
    for size in sizes:
        listen(Stage(f"seed {seed}: training on {size:,} rows"))
        yield trainer.score(size, listen)


def fitted(recipe: Recipe, scores: Sequence[Score]) -> Curve:
    """The law of some scores, checked by hiding the largest size.

    Raises:
        DataError: There are fewer than four sizes, so that nothing can be hidden.
    """
    by_size = points(scores)
    powerlaw.require_enough([point.size for point in by_size])
    better = recipe.task.higher_is_better
    bounds = {"higher_is_better": better, "highest": 1.0}
    hidden = by_size[-1]
    predicted = powerlaw.fit(by_size[:-1], **bounds).runs(hidden.size, len(hidden.scores))  # type: ignore[arg-type]
    mean = float(np.mean(hidden.scores))
    check = Hidden(hidden.size, mean, predicted, predicted.low <= mean <= predicted.high)
    return Curve(recipe.task.metric, better, tuple(scores), powerlaw.fit(by_size, **bounds), check)  # type: ignore[arg-type]


def points(scores: Sequence[Score]) -> list[Point]:
    """The scores of each size, smallest first; 3.92 standard deviations are a 95 % interval."""
    found = []
    for size in sorted({score.size for score in scores}):
        own = [score for score in scores if score.size == size]
        noise = float(np.mean([score.high - score.low for score in own])) / 3.92
        found.append(Point(size, tuple(score.value for score in own), noise))
    return found


def spread(total: int, classes: int) -> list[int]:
    """Five sizes, each twice the one before, up to all rows; fewer where they would be too small."""
    least = max(_LEAST, 2 * classes)
    return [size for size in (math.ceil(total / 2**power) for power in reversed(range(SIZES))) if size >= least]


def require_sizes(sizes: Sequence[int], total: int) -> list[int]:
    """Sizes in order, each once.

    Raises:
        DataError: There are not so many rows, or a size is no number of rows.
    """
    if wrong := [size for size in sizes if not 1 < size <= total]:
        raise DataError(f"there are {total:,} training rows, so none can train on {wrong[0]:,}", hint="Change --sizes.")
    return sorted(set(sizes))


@dataclass(frozen=True, eq=False)
class _Setting:
    """What all runs share."""

    recipe: Recipe
    rows: Data
    machine: Machine
    base: Base
    profile: Profile
    work: Path
    tokens: dict[str, Tokens]
    """Of every split; filled by the first run, whose tokenizer makes them."""

    @property
    def resolved(self) -> Recipe:
        """The recipe with the labels that were found."""
        return self.recipe.model_copy(update={"task": self.rows.task})

    @classmethod
    def of(cls, recipe: Recipe, work: Path, device_name: str, listen: Listener) -> "_Setting":
        for text in recipe.notes:
            listen(Note(text))
        machine = device.find(device_name)
        if machine.processes > 1:
            raise LowresError("a curve is made by one process", hint="Start it without a launcher.")
        listen(Stage(f"reading {recipe.data.train}"))
        progress = lambda what, done, total: listen(Fetching(what, done, total))  # noqa: E731
        rows = data.load(recipe, work, progress)
        if rows.test is None:
            raise DataError("data.test is null, so there is nothing to score on", hint="Hold out a share, or a file.")
        base = bases.resolve(recipe.model, progress)
        return cls(recipe, rows, machine, base, preparing.profiled(recipe, rows.task, base, machine), work, {})


@dataclass(frozen=True, eq=False)
class _Trainer:
    """A loaded model of one seed, which begins each size where a run of its own would."""

    setting: _Setting
    recipe: Recipe
    adapted: Adapted
    plan: Plan
    first: Mapping[str, Any]
    """The tensors before the first step."""
    order: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, setting: _Setting, seed: int) -> "_Trainer":
        spec = setting.recipe.train.model_copy(update={"seed": seed})
        recipe = setting.resolved.model_copy(update={"train": spec})
        made = plans.make(recipe, setting.profile, setting.machine)
        plan = budget.within(recipe, setting.base, setting.profile, made, setting.machine)
        adapted = shortage.twice(partial(model.load, recipe, setting.base, setting.profile, plan), plan.device)
        plan, _ = behaviour.revise(adapted, plan)
        for name, split in setting.rows.splits().items():
            if name not in setting.tokens:
                setting.tokens[name] = batches.tokenize(adapted, split, setting.work / name)
        train = setting.tokens["train"].rows
        assert train is not None
        first = {name: tensor.clone() for name, tensor in adapted.tensors().items()}
        keys = Keys(train.keys(), train.labels)
        return cls(setting, recipe, adapted, plan, first, *splits.nested(keys, recipe.task, seed))

    def score(self, size: int, listen: Listener) -> Score:
        """Train on some rows and score on test."""
        ready = self.ready(size)
        ready.adapted.restore(dict(self.first))
        fitting.fit(ready, self.setting.machine, io.StringIO(), listen)
        predicted = {
            name: evaluate.outputs(ready.adapted, tokens, self.plan)
            for name, tokens in ready.tokens.items()
            if name != "train"
        }
        task = pipeline.tuned(ready, predicted).adapted.task
        found = evaluate.score(task, ready.tokens["test"].truth, predicted["test"]).metrics[task.metric]
        return Score(size, self.recipe.train.seed, found.value, found.low, found.high)

    def ready(self, size: int) -> Ready:
        """What a run on so many rows would train with, equal texts all or none of them."""
        tokens = self.setting.tokens
        whole = tokens["train"].rows
        assert whole is not None
        count = self.ends[min(size, len(self.ends)) - 1]
        chosen = np.sort(self.order[:count])
        rows = whole.take(chosen)
        task = _weighed(self.setting, rows)
        part = batches.chosen(tokens["train"], chosen)
        recipe = self.recipe.model_copy(update={"task": task})
        adapted = replace(self.adapted, task=task)
        data_of_size = replace(self.setting.rows, task=task, train=rows)
        return Ready(recipe, data_of_size, adapted, tokens | {"train": part}, self.plan, ())


def _weighed(setting: _Setting, rows: Rows) -> Task:
    """The task with its labels, and with what follows from the rows of a size."""
    seen: dict[str, Seen] = {}
    for label in (label for labels in setting.rows.train.labels for label in labels):
        seen[label] = Seen(seen[label].count + 1 if label in seen else 1, "")
    return setting.recipe.task.resolve(seen).weigh(rows.examples(setting.rows.task))


def claim(out: Path | None, name: str) -> Path:
    """Make the folder of the results: `out`, or the first free of `curves/<name>`, `curves/<name>-2`, ...

    Raises:
        OutputError: `out` exists, or cannot be made.
    """
    first = Path("curves") / name
    numbered = (first if number == 1 else first.with_name(f"{name}-{number}") for number in itertools.count(1))
    folder = out if out is not None else next(place for place in numbered if not place.exists())
    if folder.exists():
        raise OutputError(f"{folder} exists", hint="Choose another place with --out, or remove it.")
    with files.writing(folder):
        folder.mkdir(parents=True)
    return folder


def write(curve: Curve, recipe: Recipe, folder: Path) -> None:
    """Write `curve.json`: the recipe, every score, the law, and what it says.

    Raises:
        OutputError: It cannot be written.
    """
    files.write_json(folder / "curve.json", {"recipe": recipe.model_dump(mode="json"), **curve.to_json()})
