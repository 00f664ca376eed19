"""Any number of labels for a text: what rows hold, and what is told of them."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lowres_ft import data
from lowres_ft.errors import DataError, RecipeError
from lowres_ft.splits import Keys, split
from lowres_ft.tasks.base import Ragged, Seen
from lowres_ft.tasks.classification import Classification, Text
from tests.conftest import recipe

Bases = Callable[..., Path]
LABELS = ("cold", "good", "long")
TASK = Classification(labels=LABELS, multi_label=True)
OPEN = Classification(multi_label=True)
MANY = ("task.multi_label=true", "task.labels=null")


def seen(*labels: str) -> dict[str, Seen]:
    return {label: Seen(2, f"rows.csv:{line}") for line, label in enumerate(labels, start=2)}


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ("cold;good", ["cold", "good"]),
        (" cold ; good;", ["cold", "good"]),
        ("cold;cold", ["cold"]),
        ("", []),
        (None, []),
        (float("nan"), []),
        ([], []),
        (["good", "cold", "good"], ["good", "cold"]),
        ([1, False, 0.5], ["1", "false", "0.5"]),
        (3, ["3"]),
        ("cold,good", ["cold,good"]),
    ],
)
def test_a_cell_holds_any_number_of_labels(cell: object, labels: list[str]):
    assert OPEN.read({"text": "fine", "label": cell}, "a:1") == Text("a:1", "fine", labels=labels)


def test_another_sign_may_separate_labels():
    task = Classification(multi_label=True, separator=", ")
    assert task.read({"text": "fine", "label": "so, so;so"}, "a:1").labels == ["so", "so;so"]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"a": 1}, r"a:1: the label is \{'a': 1\}, which is neither a word nor a number"),
        (["good", None], "a:1: the label is empty"),
        (["good", ["cold"]], r"a:1: the label is \['cold'\], which is neither"),
        ([0, 1, 0], r"a:1: the labels are \[0, 1, 0\], which names one twice: does a number stand for each label\?"),
        ([0.0, 0.0], "names one twice"),
        ([True, False, True], "names one twice"),
    ],
)
def test_a_cell_that_holds_no_labels_is_refused(cell: object, message: str):
    with pytest.raises(DataError, match=message):
        OPEN.read({"text": "fine", "label": cell}, "a:1")


@pytest.mark.parametrize(("yes", "no"), [(1, 0), ("1", "0"), (True, False), ("True", "false"), (1.0, 0.0), (" 1", "0")])
def test_labels_may_have_a_column_each(yes: object, no: object):
    row = {"text": "fine", "cold": yes, "good": no, "long": yes}
    assert TASK.read(row, "a:1").labels == ["cold", "long"]


@pytest.mark.parametrize("cell", ["yes", "", None, 2, -1, 0.5, float("nan"), "01"])
def test_a_column_of_a_label_that_says_neither_yes_nor_no_is_refused(cell: object):
    with pytest.raises(DataError, match=r"a:1: the column of 'good' holds .*, not 0 or 1"):
        TASK.read({"text": "fine", "cold": 1, "good": cell, "long": 0}, "a:1")


def test_every_way_to_write_labels_gives_the_same_rows(tmp_path: Path):
    rows = [(f"film {number}", [label for bit, label in enumerate(LABELS) if number >> bit & 1]) for number in range(8)]
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{text},{';'.join(own)}\n" for text, own in rows))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text, "label": own}) + "\n" for text, own in rows))
    columns = {"text": [text for text, _ in rows], "label": [own for _, own in rows]}
    parquet.write_table(pa.table(columns), tmp_path / "c.parquet")
    with open(tmp_path / "d.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "cold", "is_good", "long"])
        writer.writerows([text, *(int(label in own) for label in LABELS)] for text, own in rows)
    found = []
    for name in ("a.csv", "b.jsonl", "c.parquet", "d.csv"):
        mapped = {"good": "is_good"} if name == "d.csv" else {}
        stored, counted = data.store(str(tmp_path / name), TASK, mapped, tmp_path / f"{name}.arrow")
        assert [list(own) for own in stored.labels] == [own for _, own in rows]
        assert {label: at.count for label, at in counted.items()} == dict.fromkeys(LABELS, 4)
        found.append(stored.fingerprint())
    assert len(set(found)) == 1


def test_a_file_with_neither_a_label_column_nor_one_for_each_label_is_told(tmp_path: Path):
    (tmp_path / "a.csv").write_text("text,cold,good\nfine,1,0\n")
    with pytest.raises(DataError, match="no column 'long'; there are 'text', 'cold', 'good'") as error:
        data.store(str(tmp_path / "a.csv"), TASK, {}, tmp_path / "a.arrow")
    assert "text and label; or text and cold and good and long" in error.value.hint
    with pytest.raises(DataError, match="no column 'label'") as error:
        data.store(str(tmp_path / "a.csv"), OPEN, {}, tmp_path / "a.arrow")
    assert "list the labels in task.labels" in error.value.hint


def test_a_label_that_is_called_like_a_role_has_no_column_of_its_own():
    task = Classification(labels=("text", "image"), multi_label=True)
    assert [form.wanted for form in task.forms] == [("label",)]
    assert task.read({"text": "1", "label": "image"}, "a:1").labels == ["image"]


@pytest.mark.parametrize(
    ("labels", "sign"),
    [(("a,b", "b,c"), ","), (("a,b", "a"), ","), (("a", "c | a", "b"), "|"), (("x/y", "a,b", "b"), ",")],
)
def test_labels_that_another_sign_seems_to_separate_are_refused_with_a_hint(labels: tuple[str, ...], sign: str):
    with pytest.raises(
        DataError, match=rf"rows\.csv:\d: the label '.*' seems to be several, separated by '\{sign}'"
    ) as e:
        OPEN.resolve(seen(*labels))
    assert f"use task.separator='{sign}'" in e.value.hint


@pytest.mark.parametrize("labels", [("a,b", "c,d"), ("a", "b"), ("Smith, John", "a;b")])
def test_labels_that_share_no_part_are_taken_as_they_are(labels: tuple[str, ...]):
    assert set(OPEN.resolve(seen(*labels)).classes) == set(labels)


def test_labels_that_are_listed_may_hold_any_sign():
    task = Classification(labels=("a,b", "a"), multi_label=True)
    assert task.resolve(seen("a,b", "a")).classes == ("a,b", "a")


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        (OPEN, (), "no row has a label"),
        (OPEN, ("good",), r"the only label is 'good' \(first rows.csv:2\)"),
        (TASK, ("good", "cold"), "task.labels names 'long', which no training row has"),
        (TASK, ("good", "cold", "lnog"), r"rows.csv:4: unknown label 'lnog' \(did you mean 'long'\?\), 2 rows"),
    ],
)
def test_labels_that_make_no_task_are_told(task: Classification, labels: tuple[str, ...], message: str):
    with pytest.raises(DataError, match=message):
        task.resolve(seen(*labels))


def test_a_label_that_stands_in_test_but_never_in_train_is_named_with_file_and_line(topics: Path, tmp_path: Path):
    test = tmp_path / "test.csv"
    test.write_text("text,label\na fine film,good\na great film,good;great\n")
    for labels in ("null", "[cold, good, long]"):
        wanted = recipe(Path("no-base"), topics, "task.multi_label=true", f"task.labels={labels}", f"data.test={test}")
        with pytest.raises(DataError, match=r"test\.csv:3: unknown label 'great'"):
            data.load(wanted, tmp_path)
    listed = recipe(Path("no-base"), topics, "task.multi_label=true", "task.labels=[cold, good, long, great]")
    with pytest.raises(DataError, match=r"task\.labels names 'great', which no training row has"):
        data.load(listed, tmp_path)


@settings(max_examples=100, deadline=None)
@given(
    labels=st.lists(st.sets(st.sampled_from("abcdef")).map(lambda own: tuple(sorted(own))), min_size=12, max_size=40),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_label_of_a_split_stands_in_train(labels: list[tuple[str, ...]], seed: int):
    task = Classification(labels=tuple("abcdef"), multi_label=True)
    keys = Keys(Ragged(np.arange(len(labels), dtype=np.uint64), np.arange(len(labels) + 1)), labels)
    try:
        parts = split(keys, task, {"validation": 0.2, "test": 0.3}, seed)
    except DataError:  # all rows were needed in train
        assume(False)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(labels)))
    assert {label for row in parts["train"] for label in labels[row]} == {label for own in labels for label in own}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.separator=,"], "task.separator: is for task.multi_label=true"),
        (["task.thresholds={good: 0.3}"], "task.thresholds: is for task.multi_label=true"),
        (["task.multi_label=true", "task.thresholds={god: 0.3}"], "task.thresholds: holds 'god', which is no label"),
        (["task.multi_label=true", "task.thresholds={good: 1.0}"], "task.thresholds.good: must be less than 1"),
        (["task.multi_label=true", "task.separator="], "task.separator: must be"),
    ],
)
def test_settings_that_do_not_fit_are_told(overrides: list[str], message: str):
    with pytest.raises(RecipeError) as error:
        recipe(Path("no-base"), Path("rows.csv"), *overrides)
    assert message in error.value.message
