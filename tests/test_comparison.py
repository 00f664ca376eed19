"""Bundles on the same rows: what is better, what changed, and who saw the rows."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from lowres_ft import device, significance
from lowres_ft.bundle import Bundle
from lowres_ft.comparison import Comparison, compare, require_alike
from lowres_ft.errors import BundleError
from lowres_ft.pipeline import run
from tests import tiny, tiny_chat
from tests.conftest import Command, recipe

Bases = Callable[..., Path]
Trainer = Callable[..., Bundle]
CPU = device.find("cpu")
LONG = ("train.steps=60", "data.test=0.4")
SHORT = ("train.steps=1", "train.learning_rate=1e-6", "data.test=0.4")


@pytest.fixture
def unequal(bases: Bases, tmp_path: Path) -> tuple[Bundle, Bundle]:
    """A bundle that learned much and one that learned nothing, with 80 test rows."""
    rows = tiny.reviews(tmp_path / "many.csv", rows=200)
    made = [run(recipe(bases(), rows, *how), tmp_path / name, device_name="cpu")
            for name, how in (("good", LONG), ("bad", SHORT))]  # fmt: skip
    return made[0], made[1]


def compared(bundles: list[Bundle], work: Path, source: str | None = None) -> Comparison:
    work.mkdir()
    return compare(bundles, CPU, work, source)


# Tests


def test_mcnemar_is_the_binomial_test_of_rows_that_one_alone_gets_right():
    first = np.array([True] * 12 + [False] * 3 + [True] * 5 + [False] * 2)
    second = np.array([False] * 12 + [True] * 3 + [True] * 5 + [False] * 2)
    assert significance.mcnemar(first, second) == pytest.approx(2 * binom.cdf(3, 15, 0.5))
    assert significance.mcnemar(second, first) == pytest.approx(significance.mcnemar(first, second))
    assert significance.mcnemar(first, first) == 1.0


def test_a_bootstraps_p_value_is_never_zero_and_never_above_one():
    assert significance.bootstrap([0.1] * 999) == pytest.approx(2 / 1000)
    assert significance.bootstrap([0.0] * 999) == 1.0
    assert significance.bootstrap([-0.1] * 10 + [0.1] * 989) == pytest.approx(22 / 1000)


def test_holms_correction_by_hand():
    assert significance.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert significance.holm([0.2]) == [0.2]
    assert significance.holm([0.9, 0.8]) == [1.0, 1.0]
    assert significance.holm([]) == []


# Bundles


def test_better_is_said_where_it_holds_and_changed_rows_are_shown(unequal: tuple[Bundle, Bundle], tmp_path: Path):
    good, bad = unequal
    found = compared([good, bad, good], tmp_path / "work")
    assert (found.rows, found.metric, found.source) == (80, "accuracy", "the recipe's test rows")
    report = json.loads((good.folder / "report.json").read_text())
    assert found.contenders[0].scores.to_json() == report["scores"]["test"]
    assert [one.seen for one in found.contenders] == [{"train": 0, "validation": 0}] * 3
    assert all(one.rows_per_second > 0 for one in found.contenders)
    assert found.contenders[0].adapter_bytes == report["adapter_bytes"]

    pairs = {(pair.first, pair.second): pair for pair in found.pairs}
    assert set(pairs) == {(0, 1), (0, 2), (1, 2)}
    worse, equal = pairs[0, 1], pairs[0, 2]
    assert (worse.better, worse.test, worse.unseen) == ("first", "McNemar's exact test", True)
    assert worse.difference.high < 0
    assert worse.p < worse.p_holm < 0.05
    assert (equal.better, equal.difference.value, equal.p) == (None, 0.0, 1.0)

    first = report["scores"]["test"]["accuracy"]["value"]
    other = found.contenders[1].scores.metrics["accuracy"].value
    assert worse.difference.value == pytest.approx(other - first)
    assert len(found.changed) >= round((first - other) * 80)
    for row in found.changed:
        assert "many.csv:" in row.where
        assert row.answers[0] == row.answers[2] != row.answers[1]
        assert set(row.answers) | {row.wanted} == {"good", "bad"}


def test_a_bundle_that_was_trained_on_the_rows_wins_nothing_by_it(trained: Trainer, reviews: Path, tmp_path: Path):
    one, other = trained("bert", *LONG), trained("bert", *SHORT, out="other")
    found = compared([one, other], tmp_path / "all", str(reviews))
    assert found.rows == 60
    assert [contender.seen for contender in found.contenders] == [{"train": 30, "validation": 6}] * 2
    (pair,) = found.pairs
    assert pair.difference.count == 24  # both left the same rows for the test
    swapped = trained("bert", *LONG, "train.seed=8", out="swapped")
    mixed = compared([one, swapped], tmp_path / "seeds")
    seen = mixed.contenders[1].seen
    assert seen is not None
    assert sum(seen.values()) == 24 - mixed.pairs[0].difference.count > 0
    whole = trained("bert", *SHORT[:2], "data.validation=null", "data.test=null", out="whole")
    (pair,) = compared([one, whole], tmp_path / "against").pairs
    assert (pair.better, pair.unseen, pair.difference.count) == (None, False, 24)


def test_rows_that_are_not_there_any_more_are_told(bases: Bases, trained: Trainer, reviews: Path, tmp_path: Path):
    own = tmp_path / "own.csv"
    own.write_text(reviews.read_text())
    gone = run(recipe(bases(), own), tmp_path / "gone", device_name="cpu")
    own.write_text(reviews.read_text().replace("dull", "long"))
    found = compared([trained(), gone], tmp_path / "work")
    assert found.contenders[1].seen is None
    assert "have changed since training" in found.contenders[1].unknown
    own.unlink()
    found = compared([trained(out="again"), gone], tmp_path / "again2")
    assert "own.csv" in found.contenders[1].unknown


def test_each_bundle_cleans_the_rows_as_its_recipe_says(trained: Trainer, tmp_path: Path):
    plain, cleaned = trained(), trained("bert", 'data.clean=["lowercase"]', out="cleaned")
    found = compared([plain, cleaned], tmp_path / "work")
    report = json.loads((cleaned.folder / "report.json").read_text())
    assert found.contenders[1].scores.to_json() == report["scores"]["test"]
    assert found.contenders[1].seen == {"train": 0, "validation": 0}


@pytest.mark.parametrize(
    "changes",
    [
        ("model.quantize=int8",),
        ("method.kind=head",),
        ("method.kind=full",),
        ("model.dtype=bfloat16",),
    ],
)
def test_methods_and_storages_are_compared(trained: Trainer, tmp_path: Path, changes: tuple[str, ...]):
    other = trained("bert", *changes, out="other")
    found = compared([trained(), other], tmp_path / "work")
    assert found.contenders[1].method == other.passport.method
    report = json.loads((other.folder / "report.json").read_text())
    assert found.contenders[1].scores.to_json() == report["scores"]["test"]


def test_entities_and_many_labels_and_chat_are_compared(
    bases: Bases, chat_bases: Bases, topics: Path, chats: Path, tmp_path: Path
):
    rows = [{"words": f"Ann saw York{n} today".split(), "tags": "B-PER O B-LOC O".split()} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tags = ("task.kind=ner", "task.labels=null", "task.max_length=32", "task.overlap=8")
    many = ("task.multi_label=true", "task.labels=null")
    chat_base = chat_bases()
    works = [
        (lambda *steps: recipe(bases(), tmp_path / "rows.jsonl", *tags, *steps), "f1"),
        (lambda *steps: recipe(bases(), topics, *many, *steps), "f1_micro"),
        (lambda *steps: tiny_chat.recipe(chat_base, chats, *steps), "loss"),
    ]
    for number, (made, metric) in enumerate(works):
        bundles = [
            run(made(f"train.steps={steps}"), tmp_path / f"{number}-{steps}", device_name="cpu") for steps in (1, 12)
        ]
        found = compared(bundles, tmp_path / f"work{number}")
        assert (found.metric, found.pairs[0].test) == (metric, "paired bootstrap")
        assert found.changed
        assert json.dumps(found.to_json(), allow_nan=False)
        values = [one.scores.metrics[metric].value for one in found.contenders]
        gain = values[1] - values[0] if found.higher_is_better else values[0] - values[1]
        assert found.pairs[0].difference.value == pytest.approx(gain)


def test_what_cannot_be_compared_is_refused_by_name(trained: Trainer, bases: Bases, reviews: Path, tmp_path: Path):
    first = trained()
    with pytest.raises(BundleError, match="one bundle alone"):
        require_alike([first])
    turned = trained("bert", 'task.labels=["good", "bad"]', out="turned")
    with pytest.raises(BundleError, match=r"their labels are bad, good and good, bad"):
        require_alike([first, turned])
    many = run(recipe(bases(), reviews, "task.multi_label=true"), tmp_path / "many", device_name="cpu")
    with pytest.raises(BundleError, match=r"task\.multi_label is False and True"):
        require_alike([first, many])


def test_chat_models_of_other_tokens_are_refused(chat_bases: Bases, chats: Path, tmp_path: Path):
    long, short = (
        run(tiny_chat.recipe(chat_bases(), chats, f"task.max_length={most}"), tmp_path / str(most), device_name="cpu")
        for most in (96, 80)
    )
    with pytest.raises(BundleError, match=r"task\.max_length is 96 and 80"):
        require_alike([long, short])


# The command


def test_the_command_prints_tables_and_json(lowres: Command, unequal: tuple[Bundle, Bundle], tmp_path: Path):
    good, bad = unequal
    code, out, _ = lowres("compare", good.folder, bad.folder, "--json", "-q")
    assert code == 0
    found = json.loads(out)
    assert [one["name"] for one in found["bundles"]] == [str(good.folder), str(bad.folder)]
    assert found["pairs"][0]["better"] == "first"
    code, out, _ = lowres("compare", good.folder, bad.folder, "-q", "--rows", 2)
    assert code == 0
    assert "80 rows (the recipe's test rows)" in out
    assert "A is better than B" in out
    assert f"{len(found['changed'])} rows are not answered alike; the first 2:" in out
    assert "B over A: accuracy -0." in out
    code, out, _ = lowres("compare", good.folder, bad.folder, "--data", tmp_path / "many.csv", "-q", "--rows", 0)
    assert "note: A was trained on 100 of these rows" in out
    assert "(on the 80 rows that neither saw)" in out


def test_wrong_arguments_are_one_error(lowres: Command, trained: Trainer, tmp_path: Path):
    folder = trained().folder
    for arguments, message in (([folder], "one bundle alone"), ([folder, tmp_path / "none"], "so it is no bundle")):
        code, out, err = lowres("compare", *arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert "hint:" in err
