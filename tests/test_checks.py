"""Faults that are planted in sound data are named, and sound data is left alone."""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lowres_ft import checking, data, forked
from lowres_ft.checks import _survey, languages
from lowres_ft.checks.base import Finding
from lowres_ft.errors import DataError
from lowres_ft.events import Note
from lowres_ft.pipeline import run
from lowres_ft.recipe import Recipe
from lowres_ft.tokenizing import load_tokenizer
from tests import planted, tiny_chat
from tests.conftest import recipe

Bases = Callable[..., Path]
LONG = "task.max_length=48"


def classification(base: Path, folder: Path, plant: planted.Plant | None = None) -> Recipe:
    """A recipe on sound rows, with what is planted in them."""
    train, test = planted.reviews(400, 1), planted.reviews(120, 2)
    changes = (plant(train, test, random.Random(0)) if plant else None) or ()
    planted.write(folder / "test.csv", test)
    held = [f"data.test={folder / 'test.csv'}", "data.validation=null", LONG]
    return recipe(base, planted.write(folder / "train.csv", train), *held, *changes)


def ner(base: Path, folder: Path, rows: list[dict], *changes: str) -> Recipe:
    source = planted.jsonl(folder / "train.jsonl", rows)
    return recipe(base, source, "task.kind=ner", "data.validation=null", "data.test=null", *changes)


def chat(base: Path, folder: Path, rows: list[dict], *changes: str) -> Recipe:
    source = planted.jsonl(folder / "train.jsonl", rows)
    held = ("data.validation=null", "data.test=null", "task.max_length=2000")
    return tiny_chat.recipe(base, source, *held, *changes)


def named(findings: tuple[Finding, ...], kind: str) -> Finding:
    found = [finding for finding in findings if finding.kind == kind]
    assert found, f"{kind} is not among {[finding.kind for finding in findings]}"
    return found[0]


def test_sound_data_is_left_alone(bases: Bases, chat_bases: Bases, tmp_path: Path):
    assert checking.check(classification(bases(), tmp_path)).findings == ()
    assert checking.check(ner(bases(), tmp_path, planted.sentences(200))).findings == ()
    assert checking.check(chat(chat_bases(), tmp_path, planted.chats(120))).findings == ()


@pytest.mark.parametrize("kind", planted.CLASSIFICATION)
def test_a_planted_fault_of_texts_is_named(kind: str, bases: Bases, tmp_path: Path):
    checked = checking.check(classification(bases(), tmp_path, planted.CLASSIFICATION[kind]))
    found = named(checked.findings, kind)
    assert found.message
    assert found.hint
    assert found.count <= found.of
    assert len(found.rows) == min(found.count, 10)
    assert all(row.rpartition(":")[0].endswith(".csv") for row in found.rows)
    assert not checked.wrong


def test_at_least_twenty_kinds_are_planted():
    assert len(planted.CLASSIFICATION) >= 20


def test_the_rows_named_are_those_where_the_fault_is(bases: Bases, tmp_path: Path):
    checked = checking.check(classification(bases(), tmp_path, planted.CLASSIFICATION["markup"]))
    found = named(checked.findings, "markup")
    assert found.count == 40
    assert [row.rpartition(":")[2] for row in found.rows[:3]] == ["2", "12", "22"]
    checked = checking.check(classification(bases(), tmp_path, planted.CLASSIFICATION["label_errors"]))
    found = named(checked.findings, "label_errors")
    assert found.count >= 8
    assert all(int(row.rpartition(":")[2]) <= 21 for row in found.rows)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("conflicting_types", lambda rows: rows[0]["tags"].__setitem__(0, "B-LOC")),
        ("unmarked_entities", lambda rows: rows[0]["tags"].__setitem__(0, "O")),
        ("no_entities", lambda rows: [row.update(tags=["O"] * len(row["tags"])) for row in rows[10:]]),
        ("conflicting_duplicates", lambda rows: rows.append(rows[0] | {"tags": ["O"] * len(rows[0]["tags"])})),
        ("windows", lambda rows: rows[0].update(words=rows[0]["words"] * 8, tags=rows[0]["tags"] * 8)),
        ("duplicates", lambda rows: rows.extend(rows[:20])),
    ],
)
def test_a_planted_fault_of_entities_is_named(kind: str, change, bases: Bases, tmp_path: Path):
    rows = planted.sentences(200)
    change(rows)
    found = named(checking.check(ner(bases(), tmp_path, rows, "task.max_length=32", "task.overlap=4")).findings, kind)
    assert found.rows
    assert found.severity != "error"


@pytest.mark.parametrize(
    ("kind", "change", "overrides"),
    [
        ("repeated_answers", lambda row, at: row | {"completion": "I do not know."} if at % 9 == 0 else row, ()),
        ("echoed_questions", lambda row, at: row | {"completion": row["prompt"]} if at == 4 else row, ()),
        (
            "cut_answers",
            lambda row, at: row | {"completion": row["completion"] * 9} if at == 4 else row,
            ("task.max_length=600",),
        ),
        ("left_out", lambda row, at: row | {"prompt": row["prompt"] * 20} if at == 4 else row, ("task.too_long=drop",)),
        ("duplicates", lambda row, at: planted.chats(1)[0] if at % 9 == 0 else row, ()),
        ("few_rows", lambda row, at: row if at < 50 else None, ()),
    ],
)
def test_a_planted_fault_of_conversations_is_named(
    kind: str, change, overrides: tuple[str, ...], chat_bases: Bases, tmp_path: Path
):
    rows = [changed for at, row in enumerate(planted.chats(120)) if (changed := change(row, at)) is not None]
    assert named(checking.check(chat(chat_bases(), tmp_path, rows, *overrides)).findings, kind).rows


# What makes a result wrong, and what no run would take


def test_a_test_split_that_stands_in_train_is_an_error(bases: Bases, tmp_path: Path, lowres):
    def copy(train: list[planted.Row], test: list[planted.Row], drawn: random.Random) -> None:
        test[:] = train[:120]

    classification(bases(), tmp_path, copy)
    overrides = [f"model.base={bases()}", f"data.train={tmp_path / 'train.csv'}", f"data.test={tmp_path / 'test.csv'}"]
    code, out, _ = lowres("check", "sentiment-lora", *overrides, "task.labels=null", "data.validation=null", LONG)
    assert code == 2
    assert "error: leakage, test, 120 of 120 rows: rows of test stand in train too" in out
    assert out.endswith("infos\n")


def test_texts_that_are_all_the_same_are_an_error(bases: Bases, tmp_path: Path):
    def same(train: list[planted.Row], test: list[planted.Row], drawn: random.Random) -> None:
        train[:] = [("see the attached file", label) for _, label in train]

    checked = checking.check(classification(bases(), tmp_path, same))
    assert named(checked.findings, "constant_text").severity == "error"
    assert checked.wrong


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (("  ", "good"), "train.csv:2: the text is empty"),
        (("a text", ""), "train.csv:2: the label is empty"),
        (("a text", "goood"), r"train.csv:2: unknown label 'goood' \(did you mean 'good'\?\), 1 row"),
        (("a text", "Good"), r"unknown label 'Good' \(did you mean 'good'\?\)"),
    ],
)
def test_what_no_run_takes_is_told_in_the_same_words(row: planted.Row, told: str, bases: Bases, tmp_path: Path):
    def plant(train: list[planted.Row], test: list[planted.Row], drawn: random.Random) -> None:
        train[0] = row

    wanted = classification(bases(), tmp_path, plant)
    with pytest.raises(DataError, match=told) as caught:
        checking.check(wanted)
    (tmp_path / "work").mkdir()
    with pytest.raises(DataError) as again:
        data.load(wanted, tmp_path / "work")
    assert caught.value.message == again.value.message


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([("user", "Why?"), ("assistant", " ")], "the answer is empty"),
        ([("assistant", "So."), ("user", "Why?")], "message 1 is an answer, but no question stands before it"),
        ([("user", "Why?"), ("user", "Well?"), ("assistant", "So.")], "messages 1 and 2 are both the user's"),
    ],
)
def test_conversations_out_of_order_are_told(messages, told: str, chat_bases: Bases, tmp_path: Path):
    row = {"messages": [{"role": role, "content": content} for role, content in messages]}
    with pytest.raises(DataError, match=told):
        checking.check(chat(chat_bases(), tmp_path, [row]))


def test_answers_that_are_cut_off_whole_are_told_as_a_run_does(chat_bases: Bases, tmp_path: Path):
    rows = planted.chats(120)
    rows[4]["prompt"] *= 20
    wanted = chat(chat_bases(), tmp_path, rows)
    with pytest.raises(DataError, match=r"task\.max_length=2000 cuts all answers off in") as caught:
        checking.check(wanted)
    with pytest.raises(DataError) as again:
        run(wanted, tmp_path / "bundle", device_name="cpu")
    assert caught.value.message == again.value.message


# Samples


def test_a_sample_is_seeded_bounded_and_said(bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "work").mkdir()
    rows = data.load(classification(bases(), tmp_path, planted.CLASSIFICATION["near_duplicates"]), tmp_path / "work")
    survey = _survey.Survey.of(rows, most=100)
    part = survey.train
    assert len(part.sample(100)) == 100
    assert np.array_equal(part.sample(100), part.sample(100))
    monkeypatch.setattr(_survey, "_CHARACTERS", int(part.characters.sum()) // 2)
    assert 150 < len(part.sample(1000)) < 300


# Runs and the command line


def test_what_was_sampled_is_told(bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lowres):
    monkeypatch.setattr(_survey, "_CHARACTERS", 20_000)
    checked = checking.check(classification(bases(), tmp_path, planted.CLASSIFICATION["near_duplicates"]))
    assert checked.samples["similar"]["train"] < 430
    assert not {"damage", "duplicates", "balance"} & set(checked.samples)
    assert checking.check(ner(bases(), tmp_path, planted.sentences(40))).samples == {}


def test_a_run_tells_in_a_line_each_what_deserves_a_look(bases: Bases, tmp_path: Path):
    seen: list[str] = []
    wanted = classification(bases(), tmp_path, planted.CLASSIFICATION["conflicting_duplicates"])
    bundle = run(wanted, tmp_path / "bundle", listen=lambda e: seen.append(e.text) if isinstance(e, Note) else None)
    told = [text for text in seen if text.startswith("check: ")]
    assert any(text.startswith("check: conflicting_duplicates, train, 12 of 526 rows: ") for text in told)
    assert all("\n" not in text for text in told)
    report = json.loads((bundle.folder / "report.json").read_text())
    assert set(told) <= set(report["notes"])


def test_a_run_leaves_out_checks_that_find_infos_alone(bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Telling languages takes 100 MB, and a run would not tell what came of it."""
    wanted = classification(bases(), tmp_path, planted.CLASSIFICATION["foreign_language"])
    loaded: list[object] = []
    real = languages._identifier
    monkeypatch.setattr(languages, "_identifier", lambda: loaded.append(real()) or loaded[-1])
    (tmp_path / "work").mkdir()
    rows = data.load(wanted, tmp_path / "work")
    assert not list(checking.brief(rows, load_tokenizer(bases())))
    assert not loaded
    assert named(checking.check(wanted).findings, "foreign_language").severity == "info"
    assert len(loaded) == 1  # for all splits


def test_a_run_on_many_rows_begins_no_child_for_checks(bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Checks that would need one are left out there."""
    wanted = classification(bases(), tmp_path, planted.CLASSIFICATION["conflicting_duplicates"])
    (tmp_path / "work").mkdir()
    rows = data.load(wanted, tmp_path / "work")
    few = list(checking.brief(rows, load_tokenizer(bases())))
    monkeypatch.setattr(checking, "_FEW", 1)
    monkeypatch.setattr(forked, "result", None)
    assert [text.partition(" (")[0] for text in checking.brief(rows, load_tokenizer(bases()))] == few


def test_the_command_prints_findings_or_json(bases: Bases, tmp_path: Path, lowres):
    classification(bases(), tmp_path, planted.CLASSIFICATION["leakage"])
    overrides = [f"model.base={bases()}", f"data.train={tmp_path / 'train.csv'}", f"data.test={tmp_path / 'test.csv'}"]
    arguments = ("check", "sentiment-lora", *overrides, "task.labels=null", "data.validation=null", LONG)
    code, out, err = lowres(*arguments)
    assert code == 0
    assert "looking at every row ..." in err
    assert out.startswith("400 train, 120 test rows; labels bad, good\n")
    assert "warning: leakage, test, 8 of 120 rows: rows of test stand in train too" in out
    code, out, err = lowres(*arguments, "--json", "--quiet")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["rows"] == {"train": 400, "test": 120}
    leak = next(one for one in found["findings"] if one["kind"] == "leakage")
    assert (leak["severity"], leak["split"], leak["count"], leak["of"]) == ("warning", "test", 8, 120)
    with open(tmp_path / "test.csv", encoding="utf-8", newline="") as file:
        assert len(list(csv.reader(file))) == 121


def test_a_class_whose_rows_all_say_the_same_is_no_hindrance(bases: Bases, tmp_path: Path):
    rows = [(f"a letter about the film number {n} and more of it", "ham") for n in range(100)]
    rows += [("win a prize", "spam")] * 12
    source = planted.write(tmp_path / "train.csv", rows)
    held = ("data.validation=null", "data.test=null", "task.labels=null")
    findings = checking.check(recipe(bases(), source, *held)).findings
    assert "label_errors" not in {finding.kind for finding in findings}
