"""Rows of CoNLL files, JSON arrays, Orange's tables and ChatterBot's dialogs; tables and lines are in test_readers."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lowres_ft import formats, readers
from lowres_ft.errors import DataError

in_place = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\t\r\n "), min_size=1)
SENTENCES = st.integers(2, 4).flatmap(
    lambda width: st.lists(st.lists(st.tuples(*[WORD] * width), min_size=1, max_size=4), min_size=1, max_size=4)
)


def read(path: Path, content: str | bytes) -> list[readers.Row]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(readers.rows(str(path)))


# CoNLL

SENTENCE = [("Ada", "B-PER"), ("#", "O"), ("Paris", "B-LOC")]


def words_and_tags(rows: list[readers.Row]) -> list[list[tuple[str, str]]]:
    return [list(zip(row["words"], row["tags"], strict=True)) for _, row in rows]


@pytest.mark.parametrize("ending", [".conll", ".bio", ".iob", ".CONLL"])
@pytest.mark.parametrize(
    "content",
    [
        "Ada\tB-PER\n#\tO\nParis\tB-LOC\n",
        "Ada B-PER\n# O\nParis B-LOC",
        "Ada  B-PER \r\n#     O\r\nParis B-LOC\r\n\r\n",
        "\ufeffAda \t B-PER\n# \t O\nParis \t B-LOC\n",
        "-DOCSTART- -X- O\n\n\nAda B-PER\n# O\nParis B-LOC\n\n\n",
        "-DOCSTART-\nAda B-PER\n# O\nParis B-LOC\n-DOCSTART-\n",
        "# id = 5\n# text = Ada # Paris\nAda\tB-PER\n#\tO\nParis\tB-LOC\n\t\n",
        "# id 6f1b\tdomain=en\nAda B-PER\n# O\nParis B-LOC\n",
        "# newdoc id = news-1\n# newpar\nAda B-PER\n# O\nParis B-LOC\n",
    ],
)
def test_a_sentence_is_read_as_it_was_written(tmp_path: Path, ending: str, content: str):
    assert words_and_tags(read(tmp_path / f"a{ending}", content)) == [SENTENCE]


def test_every_column_stands_under_its_number_and_every_sentence_under_its_line(tmp_path: Path):
    path = tmp_path / "a.conll"
    first = {"words": ["Ada", "sang"], "tags": ["B", "O"], "1": ["Ada", "sang"], "2": ["NNP", "VB"], "3": ["B", "O"]}
    second = {"words": ["So"], "tags": ["O"], "1": ["So"], "2": ["RB"], "3": ["O"]}
    rows = read(path, "-DOCSTART- -X- O\n\nAda NNP B\nsang VB O\n \n# id = 2\nSo RB O\n")
    assert rows == [(f"{path}:3", first), (f"{path}:7", second)]


def test_words_without_tags_are_read_for_prediction(tmp_path: Path):
    assert [row for _, row in read(tmp_path / "a.conll", "Ada\nsang\n")] == [
        {"words": ["Ada", "sang"], "1": ["Ada", "sang"]}
    ]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("# O\nAda B-PER\n", [("#", "O"), ("Ada", "B-PER")]),
        ("#\tO\nAda\tB-PER\n", [("#", "O"), ("Ada", "B-PER")]),
        ("# = O\n1 CD O\n", [("#", "O"), ("1", "O")]),
        ("#tag O\n#a=b O\n", [("#tag", "O"), ("#a=b", "O")]),
        ("New York\tB-LOC\n", [("New York", "B-LOC")]),
        ("a\u00a0b O\nc\u2028d\u3000 O\n", [("a\u00a0b", "O"), ("c\u2028d\u3000", "O")]),
    ],
)
def test_odd_words_stay_words(tmp_path: Path, content: str, sentence: list[tuple[str, str]]):
    assert words_and_tags(read(tmp_path / "a.conll", content)) == [sentence]


@in_place
@given(sentences=SENTENCES, between=st.sampled_from(["\t", " "]), end=st.sampled_from(["\n", "\r\n"]))
def test_what_is_written_is_read_back(tmp_path: Path, sentences: list[list[tuple[str, ...]]], between: str, end: str):
    blocks = ["".join(between.join(columns) + end for columns in sentence) for sentence in sentences]
    firsts = {columns[0] for sentence in sentences for columns in sentence}
    assume(not firsts & {"#", "-DOCSTART-"} and not blocks[0].startswith("\ufeff"))
    assert words_and_tags(read(tmp_path / "a.conll", end.join(blocks))) == [
        [(columns[0], columns[-1]) for columns in sentence] for sentence in sentences
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.conll is empty"),
        (b"\n\n", r"a\.conll holds no rows"),
        (b"-DOCSTART- O\n\n", r"a\.conll holds no rows"),
        (b"a O\nb\nc O\n", r"a\.conll:2: 1 column, but its sentence, which begins on line 1, has 2"),
        (b"x O\n\na\nb O\nc O\n", r"a\.conll:3: 1 column, but its sentence, which begins on line 3, has 2"),
        (b"a O\nb c O\n", r"a\.conll:2: 3 columns, but its sentence, which begins on line 1, has 2"),
        (b"a\tO\nb\t\nc\tO\n", r"a\.conll:2: 1 column, but"),
        (b"a\tO\n\tO\nc\tO\n", r"a\.conll:2: 1 column, but"),
        (b"a\tX\tO\nb\t\tO\n", r"a\.conll:2: column 2 is empty"),
        (b"a O\n\xe9t\xe9 O\n", r"a\.conll:2: byte 1 of the line, 0xe9, is not UTF-8"),
        (b"a O\n\x00 O\n", r"a\.conll:2: byte 1 of the line is NUL"),
    ],
)
def test_a_broken_sentence_is_told_by_its_line(tmp_path: Path, content: bytes, message: str):
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path / "a.conll", content)
    assert error.value.hint


# JSON


@pytest.mark.parametrize("content", ["{}\n", "  {}", '\ufeff{"ensure": 1}', '{"a": [{"from": "human", "value": "é"}]}'])
def test_an_array_of_objects_is_read(tmp_path: Path, content: str):
    path = tmp_path / "a.json"
    item: dict[str, Any] = json.loads(content.removeprefix("\ufeff"))
    start = "\ufeff" if content.startswith("\ufeff") else ""
    rows = read(path, f"{start}[{json.dumps(item)},\n {json.dumps(item, ensure_ascii=False)}]\n")
    assert rows == [(f"{path}: item 1", item), (f"{path}: item 2", item)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", r"a\.json holds no rows"),
        (b'{"data": []}', r"a\.json holds one object, not an array of objects"),
        (b"3", r"a\.json holds a number, not"),
        (b"null", r"a\.json holds null, not"),
        (b'[{"a": 1}, ["a"]]', r"a\.json: item 2 is a list, not an object"),
        (b'[{"a": 1}, "a"]', r"a\.json: item 2 is a text, not an object"),
        (b'{"a": 1}\n{"a": 2}\n', r"a\.json:2: not JSON: Extra data at column 1"),
        (b'[{"a": 1},\n {"a": ]', r"a\.json:2: not JSON: Expecting value at column 8"),
        (b'[{"a": ' + b"9" * 5000 + b"}]", r"a\.json: cannot be read: .*4300 digits"),
        (b"[" * 200_000, r"a\.json(: cannot be read: .*recursion|:1: not JSON)"),
        (b'[{"a": "\xe9"}]', r"a\.json:1: byte 9 of the line, 0xe9, is not UTF-8"),
    ],
)
def test_a_json_file_that_is_no_array_is_told(tmp_path: Path, content: bytes, message: str):
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path / "a.json", content)
    assert error.value.hint


# Starters' own forms


def test_orange_names_the_class_a_label(tmp_path: Path):
    path = tmp_path / "a.tab"
    path.write_text("Category\tText\nd\tstring\nclass\t\n\nearn\tup by two \nship\t a strike\n")
    assert list(formats.BY_FORM["orange"](path, "a.tab")) == [
        ("a.tab:5", {"label": "earn", "text": "up by two"}),
        ("a.tab:6", {"label": "ship", "text": "a strike"}),
    ]


DIALOGS = """\ufeffcategories:
- numbers
conversations:
- - What is 6 times 7?
  - 42
- - Really?
  - no
  - Why?
- - Alone
- 'not a list - at all'
- - Show it
  - |
    print(42)

- - ja
  - nein
  - 007
  - 1e3
"""


def test_dialogs_are_questions_and_answers_as_text(tmp_path: Path):
    path = tmp_path / "maths.yml"
    path.write_text(DIALOGS, encoding="utf-8")
    found = list(formats.BY_FORM["dialogs"](path, "english/maths.yml"))
    said = [[message["content"] for message in row["messages"]] for _, row in found]
    assert said == [
        ["What is 6 times 7?", "42"],
        ["Really?", "no"],
        ["Show it", "print(42)"],
        ["ja", "nein", "007", "1e3"],
    ]
    assert [where for where, _ in found] == [f"english/maths.yml:{line}" for line in (4, 6, 11, 15)]
    assert {row["topic"] for _, row in found} == {"maths"}
    for _, row in found:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
