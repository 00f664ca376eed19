"""`python -m benchmarks.curves`: does the interval of a learning curve hold what it promises?

Each data set is trained once at all sizes and seeds; scores lie in a record from which a stopped run goes on. Then, for
each size from the fifth on and each choice of three seeds, the curve is fitted to the four sizes before it, as
`lowres-ft curve` does to check itself, and what it predicts is compared with what was measured: how often the score
lies inside, and how wide the interval is.
"""

import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

_RECORD = Path(__file__).parent / "results" / "curves.json"
_WIDEST = 0.06
_COVERAGE = 0.9
_SEEDS_OF_A_CURVE = 3
_SIZES_OF_A_FIT = 4


@dataclass(frozen=True)
class Grid:
    """What is trained of a data set."""

    recipe: str
    overrides: tuple[str, ...]
    sizes: tuple[int, ...]


_STEPS = ("train.steps=150", "train.evaluate_every=30")
"""The same steps at every size, so that a curve is of data alone: two epochs of 62 rows would hardly begin."""
_GRIDS = {
    "rotten-tomatoes": Grid("sentiment-lora", _STEPS, (62, 125, 250, 500, 1000, 2000, 4000)),
    "wnut16": Grid(
        "entities-lora",
        ("train.steps=720", "train.evaluate_every=90", "data.test=0.3"),
        (44, 88, 177, 355, 710, 1421),
    ),
    "reuters-r8": Grid(
        "topics-lora-int8",
        ("train.steps=400", "train.evaluate_every=80", "model.quantize=none", "task.max_length=64"),
        (125, 250, 500, 1000, 2000, 4000),
    ),
}


@dataclass(frozen=True)
class Case:
    """A hidden size, predicted from smaller ones by the scores of some seeds."""

    data: str
    hidden: int
    seeds: tuple[int, ...]
    measured: float
    """Mean of those seeds' scores at the hidden size."""
    value: float
    low: float
    high: float

    @property
    def inside(self) -> bool:
        """Whether the interval holds the score."""
        return self.low <= self.measured <= self.high


def main(
    name: Annotated[list[str] | None, typer.Option(help="A data set; may be repeated.  [default: all]")] = None,
    seeds: Annotated[int, typer.Option(min=_SEEDS_OF_A_CURVE)] = 4,
    record: Annotated[Path, typer.Option(help="Where scores are kept.")] = _RECORD,
    show: Annotated[bool, typer.Option("--show", help="Evaluate what the record holds; train nothing.")] = False,
) -> None:
    """Train what the record lacks, then tell coverage and width for each hidden size."""
    if unknown := set(name or ()) - set(_GRIDS):
        raise typer.BadParameter(f"no data set {', '.join(sorted(unknown))}; there are {', '.join(_GRIDS)}")
    scores = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    if not show:
        for one in name or _GRIDS:
            _train(one, seeds, scores, record)
    cases = [case for one in name or _GRIDS if one in scores for case in _cases(one, scores[one])]
    raise typer.Exit(_told(cases))


def _train(name: str, seeds: int, scores: dict[str, list[dict[str, float]]], record: Path) -> None:
    """Train the sizes and seeds that are not in the record, which is written after each."""
    from lowres_ft import curve, files
    from lowres_ft.curve import Score
    from lowres_ft.recipe import load_recipe

    grid = _GRIDS[name]
    kept = scores.setdefault(name, [])

    def heard(score: Score) -> None:
        kept.append(asdict(score))
        record.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(record, scores)
        print(f"{name}: {score.size} rows, seed {score.seed}: {score.value:.4f}", flush=True)

    known = [Score(**one) for one in kept]  # type: ignore[arg-type]
    recipe = load_recipe(grid.recipe, grid.overrides)
    with tempfile.TemporaryDirectory(prefix="curves-") as work:
        curve.measure(recipe, Path(work), sizes=grid.sizes, seeds=seeds, known=known, heard=heard)


def _cases(name: str, scores: Sequence[dict[str, float]]) -> Iterator[Case]:
    """Every size with four smaller ones, by every choice of three of the seeds that have them all."""
    from lowres_ft import curve, powerlaw
    from lowres_ft.curve import Score

    found = [Score(**one) for one in scores]  # type: ignore[arg-type]
    sizes = sorted({score.size for score in found})
    for place in range(_SIZES_OF_A_FIT, len(sizes)):
        used, hidden = sizes[place - _SIZES_OF_A_FIT : place + 1], sizes[place]
        whole = [
            seed
            for seed in sorted({score.seed for score in found})
            if {score.size for score in found if score.seed == seed} >= set(used)
        ]
        for chosen in itertools.combinations(whole, _SEEDS_OF_A_CURVE):
            own = [score for score in found if score.seed in chosen and score.size in used]
            *smaller, last = curve.points(own)
            predicted = powerlaw.fit(smaller).runs(hidden, len(chosen))
            mean = float(np.mean(last.scores))
            yield Case(name, hidden, chosen, mean, predicted.value, predicted.low, predicted.high)


def _told(cases: Sequence[Case]) -> int:
    """Print coverage and width by data set and hidden size; 1 where a goal is missed."""
    print(f"{'data':<16} {'hidden':>7} {'cases':>5} {'inside':>7} {'width':>6} {'widest':>6} {'error':>6}")
    groups = itertools.groupby(cases, key=lambda case: (case.data, case.hidden))
    for (data, hidden), group in groups:
        _line(data, f"{hidden:,}", list(group))
    if not cases:
        print("no data set has five sizes by three seeds yet")
        return 1
    _line("all", "", cases)
    covered = sum(case.inside for case in cases) / len(cases)
    widest = max(case.high - case.low for case in cases)
    print(f"goals: inside in at least {_COVERAGE:.0%}: {covered:.0%}; no wider than {_WIDEST}: {widest:.3f}")
    return 0 if covered >= _COVERAGE and widest <= _WIDEST else 1


def _line(data: str, hidden: str, cases: Sequence[Case]) -> None:
    widths = [case.high - case.low for case in cases]
    error = float(np.mean([abs(case.value - case.measured) for case in cases]))
    inside = sum(case.inside for case in cases) / len(cases)
    figures = f"{inside:>7.0%} {np.mean(widths):>6.3f} {max(widths):>6.3f} {error:>6.3f}"
    print(f"{data:<16} {hidden:>7} {len(cases):>5} {figures}")


if __name__ == "__main__":
    typer.run(main)
