"""Learning curves: nested subsets, runs that begin afresh, and the command."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lowres_ft import batches, curve, data, device, evaluate, fitting, limits, preparing, splits
from lowres_ft.curve import Score
from lowres_ft.data import Data
from lowres_ft.errors import DataError, LowresError, OutOfMemoryError
from lowres_ft.pipeline import run
from lowres_ft.recipe import Recipe
from lowres_ft.runs import run_folder
from lowres_ft.splits import Keys
from tests import planted
from tests.conftest import prepare, recipe

Bases = Callable[..., Path]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return planted.write(tmp_path / "rows.csv", planted.reviews(240, 1))


def nested(loaded: Data, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return splits.nested(Keys(loaded.train.keys(), loaded.train.labels), loaded.task, seed)


def fresh(wanted: Recipe, work: Path, seed: int, size: int) -> float:
    """The score of a run of its own on the rows of a size: everything is loaded and tokenized again."""
    work.mkdir()
    machine = device.find("cpu")
    loaded = data.load(wanted, work)
    order, ends = nested(loaded, seed)
    chosen = loaded.train.take(np.sort(order[: ends[size - 1]]))
    spec = wanted.train.model_copy(update={"seed": seed})
    resolved = wanted.model_copy(update={"task": loaded.task.weigh(chosen.examples(loaded.task)), "train": spec})
    part = replace(loaded, task=resolved.task, train=chosen)
    with run_folder("fresh", work / "out", machine) as place:
        ready = preparing.prepare(resolved, part, machine, place)
        with open(place.metrics, "w", encoding="utf-8") as log:
            fitting.fit(ready, machine, log)
        test = ready.tokens["test"]
        return evaluate.metric(resolved.task, test.truth, evaluate.outputs(ready.adapted, test, ready.plan))


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("method.dropout=0.1", "train.steps=null", "train.epochs=2"),
        ("model.quantize=int8", "method.init=loftq"),
        ("method.init=pissa",),
        ("method.kind=dora",),
        ("method.kind=ia3",),
        ("method.kind=head",),
        ("method.kind=full",),
        ("task.class_weights=balanced",),
    ],
)
def test_each_size_scores_as_a_run_of_its_own(changes: tuple[str, ...], bases: Bases, rows: Path, tmp_path: Path):
    wanted = recipe(bases(), rows, "train.steps=6", "task.max_length=48", *changes)
    (tmp_path / "work").mkdir()
    found = curve.measure(wanted, tmp_path / "work", sizes=[40, 100], seeds=2, device_name="cpu")
    assert [(score.size, score.seed) for score in found] == [(40, 7), (40, 8), (100, 7), (100, 8)]
    for number, score in enumerate(found[1:3]):
        assert fresh(wanted, tmp_path / f"fresh{number}", score.seed, score.size) == score.value


def test_all_rows_with_the_recipes_seed_score_as_the_recipe_does(bases: Bases, rows: Path, tmp_path: Path):
    wanted = recipe(bases(), rows, "train.steps=6", "task.max_length=48")
    (tmp_path / "work").mkdir()
    (found,) = curve.measure(wanted, tmp_path / "work", sizes=[192], seeds=1, device_name="cpu")
    bundle = run(wanted, tmp_path / "bundle", device_name="cpu")
    assert found.value == bundle.passport.scores["test"]["accuracy"]["value"]


def test_sizes_are_nested_stratified_and_keep_equal_texts_together(bases: Bases, tmp_path: Path):
    texts = planted.reviews(200, 1)
    texts = [(text, "good" if number % 10 else "bad") for number, (text, _) in enumerate(texts)]
    source = planted.write(tmp_path / "rows.csv", texts + texts[:30])
    (tmp_path / "work").mkdir()
    loaded = data.load(recipe(bases(), source, "data.validation=null"), tmp_path / "work")
    order, ends = nested(loaded, 3)
    keys, labels = loaded.train.keys().values, loaded.train.labels
    assert sorted(order) == list(range(len(loaded.train)))
    for size in (10, 40, 100):
        count = ends[size - 1]
        inside, outside = order[:count], order[count:]
        assert size <= count <= size + 1
        assert not np.isin(keys[inside], keys[outside]).any()
        share = np.mean([labels[row] == ("bad",) for row in inside])
        assert abs(share - 0.1) <= 1 / count + 1e-9
    assert not np.array_equal(order, nested(loaded, 4)[0])


def test_every_class_is_there_from_the_beginning(bases: Bases, tmp_path: Path):
    texts = planted.reviews(300, 1)
    rare = [(text, "bad" if number % 60 == 0 else "good") for number, (text, _) in enumerate(texts)]
    (tmp_path / "work").mkdir()
    source = planted.write(tmp_path / "rows.csv", rare)
    loaded = data.load(recipe(bases(), source, "data.validation=null"), tmp_path / "work")
    order, ends = nested(loaded, 7)
    assert {loaded.train.labels[row] for row in order[: ends[1]]} == {("bad",), ("good",)}


def test_chosen_tokens_are_those_of_rows_tokenized_alone(bases: Bases, rows: Path, tmp_path: Path):
    ready = prepare(recipe(bases(), rows), tmp_path / "work")
    tokens = ready.tokens["train"]
    rows_chosen = np.array([3, 5, 11])
    part = batches.chosen(tokens, rows_chosen)
    alone = batches.tokenize(ready.adapted, tokens.rows.take(rows_chosen), tmp_path / "work" / "alone")
    for name in ("ids", "starts", "targets", "target_starts", "firsts"):
        assert np.array_equal(getattr(part, name), getattr(alone, name))
    assert part.where(np.array([1])) == alone.where(np.array([1])) == tokens.where(tokens.of_rows(np.array([5])))


def scores(values: dict[int, float]) -> list[Score]:
    return [
        Score(size, seed, value + step, value - 0.02, value + 0.02)
        for size, value in values.items()
        for seed, step in ((7, -0.002), (8, 0.0), (9, 0.002))
    ]


def test_what_more_rows_would_bring_is_said_in_words(bases: Bases, rows: Path):
    wanted = recipe(bases(), rows)
    steep = curve.fitted(wanted, scores({n: 0.95 - 3 * n**-0.5 for n in (100, 200, 400, 800, 1600)}))
    assert steep.told().startswith("doubling from 1,600 to 3,200 training rows would make accuracy better by 0.0")
    flat = curve.fitted(wanted, scores(dict.fromkeys((100, 200, 400, 800, 1600), 0.9)))
    assert flat.told().startswith("doubling from 1,600 to 3,200 training rows would bring little")
    wild = curve.fitted(wanted, scores({100: 0.5, 200: 0.7, 400: 0.62, 800: 0.75}))
    assert wild.told().startswith("cannot tell whether doubling from 800 to 1,600 training rows is worth it")
    assert steep.hidden.inside
    assert steep.hidden.size == 1600


def test_what_cannot_be_a_curve_is_told(bases: Bases, rows: Path, tmp_path: Path):
    (tmp_path / "work").mkdir()
    with pytest.raises(DataError, match="there are 192 training rows, so none can train on 500"):
        curve.measure(recipe(bases(), rows), tmp_path / "work", sizes=[50, 500], device_name="cpu")
    with pytest.raises(DataError, match=r"data\.test is null"):
        curve.measure(recipe(bases(), rows, "data.test=null"), tmp_path / "work", device_name="cpu")
    with pytest.raises(DataError, match="a curve needs four sizes: three to fit it and one to check it, not 2"):
        curve.fitted(recipe(bases(), rows), scores({100: 0.5, 200: 0.6}))


def test_sizes_double_up_to_all_rows():
    assert curve.spread(6826, 2) == [427, 854, 1707, 3413, 6826]
    assert curve.spread(150, 8) == [19, 38, 75, 150]


def test_scores_that_are_known_are_not_measured_again(bases: Bases, rows: Path, tmp_path: Path):
    heard: list[Score] = []
    known = [Score(40, 7, 0.123, 0.1, 0.2)]
    (tmp_path / "work").mkdir()
    found = curve.measure(
        recipe(bases(), rows),
        tmp_path / "work",
        sizes=[40, 60],
        seeds=1,
        device_name="cpu",
        known=known,
        heard=heard.append,
    )
    assert found[0] == known[0]
    assert [score.size for score in heard] == [60]


def test_the_command_draws_and_tells(bases: Bases, rows: Path, tmp_path: Path, lowres, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = (
        f"model.base={bases()}",
        f"data.train={rows}",
        "task.labels=null",
        "train.steps=2",
        "task.max_length=48",
    )
    arguments = ("curve", "sentiment-lora", *overrides, "--sizes", "24,48,96,192", "--device", "cpu", "--quiet")
    code, out, err = lowres(*arguments, "--seeds", "2")
    assert (code, err) == (0, "")
    assert "check: 192 rows, predicted from the smaller sizes: " in out
    folder = tmp_path / "curves" / "sentiment-lora"
    assert sorted(path.name for path in folder.iterdir()) == ["curve.json", "curve.png", "curve.svg"]
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "training rows" in (folder / "curve.svg").read_text() or "<svg" in (folder / "curve.svg").read_text()
    written = json.loads((folder / "curve.json").read_text())
    assert [one["size"] for one in written["curve"]] == [24, 48, 96, 192]
    assert written["recipe"]["name"] == "sentiment-lora"
    code, out, _ = lowres(*arguments, "--seeds", "1", "--json", "--out", tmp_path / "mine")
    found = json.loads(out)
    assert found["doubling"]["to"] == 384
    assert len(found["scores"]) == 4
    code, _, err = lowres(*arguments, "--out", tmp_path / "mine")
    assert code == 2
    assert "mine exists" in err
    code, _, err = lowres("curve", "sentiment-lora", "--sizes", "50,100,100", "--out", "few")
    assert code == 2
    assert "a curve needs four sizes: three to fit it and one to check it, not 2" in err
    assert not Path("few").exists()
    code, _, err = lowres("curve", "sentiment-lora", "--sizes", "a,b")
    assert code == 2
    assert "'a,b' is not whole numbers with commas between" in " ".join(err.split())


def test_several_processes_are_refused(bases: Bases, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    machine = replace(device.find("cpu"), processes=2)
    monkeypatch.setattr(device, "find", lambda name: machine)
    with pytest.raises(LowresError, match="a curve is made by one process"):
        curve.measure(recipe(bases(), rows), tmp_path)


def test_a_curve_is_held_to_its_budget_and_says_what_would_help(
    bases: Bases, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    held: list[object] = []
    monkeypatch.setattr(limits, "held", lambda most, *_: nullcontext(held.append(most)))

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(fitting, "fit", full)
    with pytest.raises(OutOfMemoryError, match="memory ran out") as caught:
        curve.measure(recipe(bases(), rows, "budget.memory=3GiB"), tmp_path, sizes=(32,), device_name="cpu")
    assert held == [3 * 2**30]
    assert "model.quantize=int8 saves" in caught.value.hint
