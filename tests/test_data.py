"""Rows on disk and their splits: what a recipe's sources become, and what is told when they cannot."""

import csv
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from lowres_ft import data
from lowres_ft.data import Data, Rows
from lowres_ft.errors import DataError, OutputError
from lowres_ft.splits import Keys, split
from lowres_ft.tasks.classification import Classification, Text
from tests.conftest import recipe

TASK = Classification(labels=("bad", "good"))
TEN = [(f"film {number}", ("bad", "good")[number % 2]) for number in range(40)]


def write(path: Path, rows: Iterable[tuple[object, object]], header: tuple[str, str] = ("text", "label")) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def load(path: Path, *overrides: str) -> Data:
    """What a run reads: labels bad and good, a tenth for validation and a tenth for test, unless overridden."""
    return data.load(recipe(Path("no-base"), path, *overrides), path.parent)


def rows_of(pairs: Iterable[tuple[str, str]]) -> Rows:
    """Rows in two chunks, as a file of many has them."""
    raw = [data._record(TASK, Text(f"rows:{number}", *pair)) for number, pair in enumerate(pairs)]
    chunks = [pa.RecordBatch.from_pylist(part, data._SCHEMA) for part in (raw[:7], raw[7:])]
    return Rows(pa.Table.from_batches(chunks), np.arange(len(raw)))


def texts(rows: Rows | None) -> list[str]:
    assert rows is not None
    return [example.text for example in rows.examples(TASK.model_copy(update={"labels": None}))]


# What is read


def test_rows_come_back_as_they_were_read_in_any_order(tmp_path: Path):
    path = write(tmp_path / "rows.csv", ((f"film\n{number} 好 😀", number % 2) for number in range(10_000)))
    rows, seen = data.store(str(path), TASK, {}, tmp_path / "rows.arrow")
    order = np.random.default_rng(0).permutation(10_000)
    examples = list(rows.take(order).examples(TASK))
    assert rows.table["example"].num_chunks > 1
    assert [example.text for example in examples] == [f"film\n{number} 好 😀" for number in order]
    assert [example.label for example in examples] == [str(number % 2) for number in order]
    assert [example.where for example in examples] == [f"{path}:{2 * number + 2}" for number in order]
    assert rows.take(order).labels == [(example.label,) for example in examples]
    assert rows.take(order).take(np.array([3, 3, 0])).labels == [(examples[place].label,) for place in (3, 3, 0)]
    assert {label: (at.count, at.where) for label, at in seen.items()} == {
        "0": (5000, f"{path}:2"),
        "1": (5000, f"{path}:4"),
    }


def test_columns_are_mapped_by_name(tmp_path: Path):
    content = "id,review,stars\n" + "".join(f"{number},film {number},{number % 5 + 1}\n" for number in range(50))
    (tmp_path / "mine.csv").write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
    mapped = ("data.columns.text=review", "data.columns.label=stars")
    found = load(tmp_path / "mine.csv", *mapped, "task.labels=null")
    assert found.task.labels == ("1", "2", "3", "4", "5")  # type: ignore[attr-defined]
    assert {name: len(rows) for name, rows in found.splits().items()} == {"train": 40, "validation": 5, "test": 5}
    assert sorted(texts(found.train) + texts(found.validation) + texts(found.test)) == sorted(
        f"film {number}" for number in range(50)
    )


@pytest.mark.parametrize(
    ("values", "labels", "found"),
    [
        ([1, 2, 3, 4, 5], "null", ("1", "2", "3", "4", "5")),
        ([10, 9, 2, 1], "null", ("1", "2", "9", "10")),
        ([1.5, 0.5, 1.0], "null", ("0.5", "1.0", "1.5")),
        ([True, False], "null", ("false", "true")),
        ([1, 2, 3, 4, 5], "[5, 4, 3, 2, 1]", ("5", "4", "3", "2", "1")),
        ([0.5, 1.0, 1.5], "[0.5, 1.0, 1.5]", ("0.5", "1.0", "1.5")),
        (["very good", "Bad", "so-so"], "null", ("Bad", "so-so", "very good")),
        (["Very Good", "bad"], "[Very Good, bad]", ("Very Good", "bad")),
        ([0, 1], "[negative, positive]", ("negative", "positive")),
        (["0", "1"], "[negative, positive]", ("negative", "positive")),
        (["negative", "1"], "[negative, positive]", ("negative", "positive")),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_labels_are_matched_or_found(tmp_path: Path, kind: str, values: list[Any], labels: str, found: tuple[str]):
    rows = [(f"film {number}", values[number % len(values)]) for number in range(6 * len(values))]
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        write(path, [(text, str(label).lower() if isinstance(label, bool) else label) for text, label in rows])
    else:
        parquet.write_table(
            pa.table(dict(zip(("text", "label"), map(list, zip(*rows, strict=True)), strict=True))), path
        )
    assert load(path, f"task.labels={labels}").task.labels == found  # type: ignore[attr-defined]


def test_a_published_split_is_left_as_it_is_and_its_overlap_told(tmp_path: Path):
    train = write(tmp_path / "train.csv", TEN)
    published = [("film 3", "good"), ("new 1", "bad"), ("new 1", "bad"), ("film 8", "bad"), ("new 2", "good")]
    test = write(tmp_path / "test.csv", published)
    found = load(train, f"data.test={test}", "data.validation=null")
    assert texts(found.test) == [text for text, _ in published]
    assert found.notes == ("2 of 5 test texts stand in train too; scored with and without",)
    assert data.apart(found.splits()["test"], *found.before("test")).tolist() == [1, 2, 4]
    assert found.validation is None
    assert sorted(texts(found.train)) == sorted(text for text, _ in TEN)


def test_a_published_split_without_overlap_has_no_note(tmp_path: Path):
    test = write(tmp_path / "test.csv", [("new 1", "bad"), ("new 2", "bad")])
    found = load(write(tmp_path / "train.csv", TEN), f"data.test={test}")
    assert found.notes == ()
    assert data.apart(found.splits()["test"], *found.before("test")).tolist() == [0, 1]


def test_a_limit_takes_the_first_rows_of_the_shuffled_train_and_no_others(tmp_path: Path):
    path = write(tmp_path / "rows.csv", TEN)
    whole, few = load(path), load(path, "data.limit=10")
    assert texts(few.train) == texts(whole.train)[:10]
    assert texts(few.test) == texts(whole.test)
    assert texts(few.validation) == texts(whole.validation)


def test_the_fingerprint_of_a_split_follows_its_texts_labels_and_order(tmp_path: Path):
    pairs = [("a", "bad"), ("b", "good"), ("c", "bad")]
    changed = [pairs[::-1], [("a", "bad"), ("b", "good")], [("a", "good"), *pairs[1:]], [("d", "bad"), *pairs[1:]]]
    prints = {rows_of(rows).fingerprint() for rows in [pairs, *changed]}
    assert len(prints) == 5
    assert rows_of(pairs).fingerprint() in prints


def test_a_file_larger_than_the_memory_allowed_is_read_split_and_given_back(tmp_path: Path):
    path, count = tmp_path / "large.csv", 100_000
    filler = "word " * 105
    with open(path, "w") as file:
        file.write("text,label\n")
        file.writelines(f"{number} {filler},{number % 2}\n" for number in range(count))
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        rows, _ = data.store(str(path), TASK, {}, tmp_path / "large.arrow")
        _, stored = tracemalloc.get_traced_memory()
        train = rows.take(split(Keys(rows.keys(), rows.labels), TASK, {"test": 0.1}, seed=1)["train"])
        given = sum(1 for _ in zip(range(10_000), train.examples(TASK), strict=False))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    size = path.stat().st_size
    assert size > 50_000_000
    assert (len(train), given) == (90_000, 10_000)
    assert stored + pool.max_memory() < size / 5
    assert peak + pool.max_memory() < size / 1.5


# What is told


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        ("txt,label\nfine,good\n", r"a\.csv:2: no column 'text' \(did you mean 'txt'\?\)", "data.columns.text="),
        ("text,Labels\nfine,good\n", r"a\.csv:2: no column 'label' \(did you mean 'Labels'\?\)", "data.columns.label="),
        ("review,stars\nfine,5\n", r"a\.csv:2: no column 'text'; there are 'review', 'stars'$", "data.columns.text="),
        ("text,label\n ,good\n", r"a\.csv:2: the text is empty", "Mend or remove"),
        ('text,label\n"a\nb",good\nfine,\n', r"a\.csv:4: the label is empty", "Mend or remove"),
        ("text,label\nfine,  \n", r"a\.csv:2: the label is empty", "Mend or remove"),
        ("text,label\n,good\na,\n", r"a\.csv:2: the text is empty\n  .*a\.csv:3: the label is empty", "Mend or remove"),
        ("text,label\na,good\nb,bda\nc,bda\n", r"a\.csv:3: unknown label 'bda' \(did you mean 'bad'.*, 2 rows", "null"),
        ("text,label\na,Good\n", r"a\.csv:2: unknown label 'Good' \(did you mean 'good'\?\), 1 row$", "'bad', 'good'"),
        ("text,label\na,0\nb,1\nc,2\n", r"a\.csv:4: unknown label '2', 1 row$", "the numbers 0 to 1 may stand"),
        ("text,label\na,-1\n", r"a\.csv:2: unknown label '-1'", "the numbers 0 to 1 may stand"),
        ("text,label\na,1.0\n", r"a\.csv:2: unknown label '1\.0'", "the numbers 0 to 1 may stand"),
        ("text,label\na,good\nb,good\n", r"every row has the label 'good' \(first .*a\.csv:2\)", "another class"),
        ("text,label\na,good\nb,1\n", r"every row has the label 'good'", "another class"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_are_told(tmp_path: Path, content: str, message: str, hint: str):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path / "a.csv")
    assert hint in error.value.hint


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "fine", "label": null}', "the label is empty"),
        ('{"text": "fine", "label": NaN}', "the label is empty"),
        ('{"text": "fine", "label": ["good"]}', r"the label is \['good'\], which is neither a word nor a number"),
        ('{"text": null, "label": "good"}', "the text is empty"),
        ('{"text": 5, "label": "good"}', "the text is 5, which is not text"),
        ('{"text": {"a": "b"}, "label": "good"}', r"the text is \{'a': 'b'\}, which is not text"),
        ('{"text": "half \\ud83d", "label": "good"}', "the text holds half a character"),
        ('{"text": "fine", "label": "go\\udc00od"}', "the label holds half a character"),
        ('{"text": "fine"}', "no column 'label'"),
    ],
)
def test_values_of_json_rows_that_cannot_be_used_are_told(tmp_path: Path, line: str, message: str):
    (tmp_path / "a.jsonl").write_text('{"text": "dull", "label": "bad"}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {message}") as error:
        load(tmp_path / "a.jsonl")
    assert error.value.hint


def test_half_a_character_in_a_column_that_is_not_read_does_not_matter(tmp_path: Path):
    lines = [f'{{"text": "{text}", "label": "{label}", "user": "\\ud83d"}}\n' for text, label in TEN]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    assert len(load(tmp_path / "a.jsonl").train) == 32


def test_ten_problems_with_rows_are_told_at_once_and_no_more(tmp_path: Path):
    path = write(tmp_path / "a.csv", [("", "good")] * 30)
    with pytest.raises(DataError) as error:
        load(path)
    assert error.value.message.split("\n  ") == [f"{path}:{line}: the text is empty" for line in range(2, 12)]


def test_every_unknown_label_is_told_once_with_its_rows(tmp_path: Path):
    path = write(tmp_path / "a.csv", [(f"film {number}", f"label {number % 15}") for number in range(45)])
    with pytest.raises(DataError) as error:
        load(path)
    told = error.value.message.splitlines()
    assert told[0] == f"{path}:2: unknown label 'label 0', 3 rows"
    assert told[-1] == "  and 5 more"
    assert len(told) == 11


def test_stars_under_words_are_refused(tmp_path: Path):
    path = write(tmp_path / "a.csv", [(f"film {number}", number % 5 + 1) for number in range(50)])
    with pytest.raises(DataError, match=r"unknown label '2', 10 rows\n.*unknown label '3'") as error:
        load(path, "task.labels=[negative, positive]")
    assert "'negative', 'positive', for which the numbers 0 to 1 may stand, in this order" in error.value.hint


def test_a_label_written_otherwise_names_the_nearest(tmp_path: Path):
    path = write(tmp_path / "a.csv", [*TEN, ("film", "very good")])
    with pytest.raises(DataError, match=r"a\.csv:42: unknown label 'very good' \(did you mean 'Very Good'\?\), 1 row$"):
        load(path, "task.labels=[bad, good, Very Good]")


def test_a_class_that_no_row_has_is_told(tmp_path: Path):
    with pytest.raises(DataError, match=r"task\.labels names 'great', which no training row has") as error:
        load(write(tmp_path / "a.csv", TEN), "task.labels=[bad, good, great]")
    assert "Found are 'bad', 'good'" in error.value.hint


@pytest.mark.parametrize("labels", ["null", "[bad, good]"])
def test_a_column_of_free_text_is_no_label_column(tmp_path: Path, labels: str):
    path = write(tmp_path / "a.csv", ((f"film {number}", f"page {number} " + "word " * 200) for number in range(3000)))
    with pytest.raises(DataError, match="more than 1,000 different labels, such as 'page 0 word") as error:
        load(path, f"task.labels={labels}")
    assert "data.columns.label=NAME" in error.value.hint
    assert len(error.value.message) < 300


def test_a_short_column_of_free_text_is_no_label_column_either(tmp_path: Path):
    path = write(tmp_path / "a.csv", ((f"film {number}", f"page {number}") for number in range(30)))
    with pytest.raises(DataError, match=r"too few different texts: 'page 0' has 1, .* 20 more classes") as error:
        load(path, "task.labels=null")
    assert "Is this the label column?" in error.value.hint


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("good", "Good"), r"a\.csv:3: the label 'Good' differs from 'good' \(.*a\.csv:2\)"),
        (("not good", "not  good"), r"a\.csv:3: the label 'not  good' differs from 'not good'"),
        (("caf\u00e9", "cafe\u0301"), r"a\.csv:3: the label 'cafe\u0301' differs from 'caf\u00e9'"),
        (("1", "1.0"), r"a\.csv:3: the label '1\.0' differs from '1'"),
    ],
)
def test_found_labels_that_differ_only_in_writing_are_told(tmp_path: Path, labels: tuple[str, str], message: str):
    path = write(tmp_path / "a.csv", [(f"film {number}", labels[number % 2]) for number in range(40)])
    with pytest.raises(DataError, match=message) as error:
        load(path, "task.labels=null")
    assert "task.labels" in error.value.hint
    assert load(path, f"task.labels={list(labels)}").task.labels == labels  # type: ignore[attr-defined]


def test_spaces_around_a_label_are_no_part_of_it(tmp_path: Path):
    path = write(tmp_path / "a.csv", [(f"film {number}", (" bad", "good ")[number % 2]) for number in range(40)])
    assert load(path, "task.labels=null").task.labels == ("bad", "good")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("good", "overrides", "message", "hint"),
    [
        (2, (), "'good' has 2; a class needs at least 3, to stand in train, validation, test$", "10 or more of each"),
        (1, ("data.validation=null",), "'good' has 1; .* at least 2, to stand in train, test$", "data.test=null"),
        (2, ("data.validation=0.3", "data.test=0.05"), "'good' has 2; .* at least 3", "20 or more of each"),
    ],
)  # fmt: skip
def test_too_few_rows_for_the_splits_are_told_with_the_least(
    tmp_path: Path, good: int, overrides: tuple[str, ...], message: str, hint: str
):
    rows = [*((f"dull {number}", "bad") for number in range(20)), *((f"fine {n}", "good") for n in range(good))]
    with pytest.raises(DataError, match=message) as error:
        load(write(tmp_path / "a.csv", rows * 3), *overrides)
    assert hint in error.value.hint
    load(write(tmp_path / "a.csv", [*rows, ("one more", "good")]), *overrides)


def test_shares_that_leave_nothing_to_train_on_are_refused(tmp_path: Path):
    path = write(tmp_path / "a.csv", TEN)
    with pytest.raises(DataError, match=r"data\.validation and data\.test take 0\.4 \+ 0\.6 of the rows"):
        load(path, "data.validation=0.4", "data.test=0.6")
    assert len(load(path, "data.validation=0.4", "data.test=0.5").train) == 4


def test_a_limit_that_leaves_one_class_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"data\.limit=1 leaves 1 of the classes without a row") as error:
        load(write(tmp_path / "a.csv", TEN), "data.limit=1")
    assert "Raise it" in error.value.hint


def test_labels_of_a_published_split_are_checked_by_line(tmp_path: Path):
    test = write(tmp_path / "test.csv", [("new", "good"), ("newer", "godo")])
    with pytest.raises(DataError, match=r"test\.csv:3: unknown label 'godo' \(did you mean 'good'\?\)"):
        load(write(tmp_path / "train.csv", TEN), f"data.test={test}")


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path):
    path = write(tmp_path / "a.csv", TEN)
    with pytest.raises(OutputError, match=r"none/rows\.arrow: cannot be written: .*No such file"):
        data.store(str(path), TASK, {}, tmp_path / "none" / "rows.arrow")
