"""Rows from files and from the Hub: what is read, where it stands, and one clear error for each thing that is wrong."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lowres_ft import readers
from lowres_ft.errors import DataError

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
in_place = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(path: Path, content: str | bytes) -> list[readers.Row]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(readers.rows(str(path)))


def values(path: Path, content: str | bytes) -> list[dict[str, Any]]:
    return [row for _, row in read(path, content)]


def lines_of(rows: list[readers.Row]) -> list[int]:
    return [int(where.rpartition(":")[2]) for where, _ in rows]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("plain.csv", "text,label\nfine,1\n", "fine"),
        ("upper.CSV", "text,label\nfine,1\n", "fine"),
        ("no-last-newline.csv", "text,label\nfine,1", "fine"),
        ("bom.csv", b"\xef\xbb\xbftext,label\nfine,1\n", "fine"),
        ("bom-quoted.csv", b'\xef\xbb\xbf"text","label"\n"fine","1"\n', "fine"),
        ("crlf.csv", "text,label\r\nfine,1\r\n", "fine"),
        ("spaces-in-header.csv", " text , label \nfine,1\n", "fine"),
        ("blank-lines.csv", "\n\ntext,label\n\nfine,1\n   \n\n", "fine"),
        ("comma.csv", 'text,label\n"fine, warm",1\n', "fine, warm"),
        ("doubled-quote.csv", 'text,label\n"a ""fine"" film",1\n', 'a "fine" film'),
        ("bare-quote.csv", 'text,label\na "fine" film,1\n', 'a "fine" film'),
        ("newline.csv", 'text,label\n"fine\nand warm",1\n', "fine\nand warm"),
        ("crlf-newline.csv", 'text,label\r\n"fine\r\nand warm",1\r\n', "fine\r\nand warm"),
        ("emoji.csv", "text,label\n👩‍👩‍👧 🇨🇭 fine,1\n", "👩‍👩‍👧 🇨🇭 fine"),
        ("chinese.csv", "text,label\n这部电影很好看。我喜欢,1\n", "这部电影很好看。我喜欢"),
        ("line-separator.csv", "text,label\nfine\u2028and\x85warm,1\n", "fine\u2028and\x85warm"),
        ("plain.tsv", "text\tlabel\nfine, warm\t1\n", "fine, warm"),
        ("plain.jsonl", '{"text": "fine", "label": "1"}\n\n', "fine"),
        ("bom.jsonl", b'\xef\xbb\xbf{"text": "fine", "label": "1"}\r\n', "fine"),
        ("escapes.jsonl", '{"text": "\\ud83d\\ude00\\n\\u597d", "label": "1"}\n', "😀\n好"),
    ],
)
def test_a_row_is_read_as_it_was_written(tmp_path: Path, name: str, content: str | bytes, text: str):
    assert values(tmp_path / name, content) == [{"text": text, "label": "1"}]


def test_a_text_in_quotes_may_hold_tabs_and_line_breaks(tmp_path: Path):
    texts = ["a\tb\nc\td", "one\n\ttwo\n\tthree", "a\n\tb\n", "tab\there"]
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("text", "label"), *((text, "good") for text in texts)])
    assert [row["text"] for _, row in readers.rows(str(tmp_path / "a.tsv"))] == texts


def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path: Path):
    columns = [pa.array(["fine"]), pa.array(["good"]), pa.array(["bad"])]
    parquet.write_table(pa.Table.from_arrays(columns, ["text", "label", "label"]), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet: two columns are called 'label'"):
        list(readers.rows(str(tmp_path / "rows.parquet")))


def test_parquet_rows_keep_their_types_and_are_counted_over_batches(tmp_path: Path):
    table = pa.table({"text": ["fine"] * 2000, "label": pa.array([1] * 1999 + [None], pa.int64())})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=700)
    rows = list(readers.rows(str(tmp_path / "rows.parquet")))
    assert rows[0] == (f"{tmp_path}/rows.parquet:row 1", {"text": "fine", "label": 1})
    assert rows[-1] == (f"{tmp_path}/rows.parquet:row 2000", {"text": "fine", "label": None})


@in_place
@given(rows=st.lists(st.tuples(ANY_TEXT, ANY_TEXT), min_size=1, max_size=8), end=st.sampled_from(["\n", "\r\n"]))
def test_what_the_csv_module_writes_is_read_back(tmp_path: Path, rows: list[tuple[str, str]], end: str):
    written = io.StringIO(newline="")
    csv.writer(written, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
    found = read(tmp_path / "rows.csv", written.getvalue())
    assert [tuple(row.values()) for _, row in found] == rows
    heights = [1 + "".join(row).count("\n") for row in rows]
    assert lines_of(found) == [2 + sum(heights[:index]) for index in range(len(rows))]


@in_place
@given(
    rows=st.lists(st.dictionaries(ANY_TEXT, ANY_TEXT | st.integers() | st.none()), min_size=1), escaped=st.booleans()
)
def test_what_the_json_module_writes_is_read_back(tmp_path: Path, rows: list[dict[str, Any]], escaped: bool):
    content = "".join(json.dumps(row, ensure_ascii=escaped) + "\n" for row in rows)
    assert values(tmp_path / "rows.jsonl", content) == rows


def test_a_row_is_named_by_its_first_line(tmp_path: Path):
    rows = read(tmp_path / "rows.csv", 'text,label\n"a\n\nb",1\n\nc,2\n"d\n",3\ne,4\n')
    assert lines_of(rows) == [2, 6, 7, 9]


def test_a_row_is_named_by_the_path_that_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("text\nfine\n")
    assert list(readers.rows("rows.csv")) == [("rows.csv:2", {"text": "fine"})]


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.csv").write_text("text\nfine\n")
    assert [row for _, row in readers.rows("~/rows.csv")] == [{"text": "fine"}]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.csv", ["a", "b"]),
        ("**/*.csv", ["a", "b", "below"]),
        ("[b].*", ["b"]),
        ("[1].jsonl", ["brackets"]),
        ("?.*", ["a", "b"]),
    ],
)
def test_a_glob_is_read_in_the_order_of_names(tmp_path: Path, pattern: str, found: list[str]):
    (tmp_path / "c").mkdir()
    for name, text in {"b.csv": "b", "a.csv": "a", "c/d.csv": "below"}.items():
        (tmp_path / name).write_text(f"text\n{text}\n")
    (tmp_path / "[1].jsonl").write_text('{"text": "brackets"}\n')
    assert [row["text"] for _, row in readers.rows(str(tmp_path / pattern))] == found


@pytest.mark.parametrize(
    ("name", "content", "message", "hint"),
    [
        ("a.csv", b"", r"a\.csv is empty", "saved"),
        ("a.jsonl", b"", r"a\.jsonl is empty", "saved"),
        ("a.parquet", b"", r"a\.parquet is empty", "saved"),
        ("a.csv", b"\xef\xbb\xbf", r"a\.csv holds no rows", "below the header"),
        ("a.csv", b"text,label\n", r"a\.csv holds no rows", "below the header"),
        ("a.tsv", b"text\tlabel\r\n\r\n", r"a\.tsv holds no rows", "below the header"),
        ("a.jsonl", b"\n \n", r"a\.jsonl holds no rows", "a line of its own"),
        ("a.csv", b"x,y\n1,2\n3\n", r"a\.csv:3: 1 field, but the header has 2 \(x, y\)", "separated by commas"),
        ("a.csv", b"x,y\n1,2,3\n", r"a\.csv:2: 3 fields, but the header has 2 \(x, y\)", "in double quotes"),
        ("a.csv", b'x,y\n"1\n\n",2\n3\n', r"a\.csv:5: 1 field,", "line break"),
        ("a.csv", b'x,y\n"1\n\n",2,3\n4,5\n', r"a\.csv:2: 3 fields,", "in double quotes"),
        ("a.tsv", b"x\ty\n1\n", r"a\.tsv:2: 1 field,", "separated by tabs"),
        ("a.csv", b"x,x\n1,2\n", r"a\.csv:1: two columns are called 'x'", "Rename"),
        (
            "a.jsonl",
            b'{"x": 1}\n{"x": 1, "x": 2}\n',
            r"a\.jsonl:2: .*two values of an object are called 'x'",
            "One object",
        ),
        (
            *("a.tsv", b'x\ty\n"one\tbad\ntwo\tgood\nthree"\tbad\n'),
            *(r"a\.tsv:2: the quote that opens here closes on line 4, with whole rows inside", "written as three"),
        ),
        ("a.csv", b"x;y\n1;2\n", r"a\.csv:1: .* by semicolons, not by commas", ".csv, or with tabs as .tsv"),
        ("a.csv", b"x\ty\n1\t2\n", r"a\.csv:1: .* by tabs, not by commas", ".tsv"),
        ("a.csv", b"\nx|y,z\n", r"a\.csv holds no rows", "below the header"),
        ("a.tsv", b"x,y\n1,2\n", r"a\.tsv:1: .* by commas, not by tabs", ".csv"),
        ("a.csv", b'x,y\n1,2\n"3,4\n5,6\n', r"a\.csv:3: the quote that opens here is never closed", "doubled"),
        ("a.csv", b'x,y\n1,2\n"3" 4,5\n', r"a\.csv:3: text follows the closing quote", "doubled"),
        ("a.csv", b"x,y\r1,2\r3,4\r", r"a\.csv:1: a line ends in CR alone", "LF or CRLF"),
        ("a.csv", b"x,y\n" + b"a" * (1 << 24) + b"b,2\n", r"a\.csv:2: a field of more than 16,777,216", "doubled"),
        ("a.csv", b"x,y\n1,caf\xe9\n", r"a\.csv:2: byte 6 of the line, 0xe9, is not UTF-8", "iconv -f WINDOWS-1252"),
        ("a.jsonl", b'{"x": 1}\n{"x": "\xff"}', r"a\.jsonl:2: byte 8 of the line, 0xff", "iconv -f WINDOWS-1252"),
        ("a.csv", "x,y\n1,2\n".encode("utf-16"), r"a\.csv:1: the file is UTF-16", "iconv -f UTF-16 -t UTF-8"),
        ("a.csv", "x,y\n1,2\n".encode("utf-16-le"), r"a\.csv:1: byte 2 of the line is NUL", "iconv -f UTF-16"),
        ("a.jsonl", '{"x": 1}\n'.encode("utf-16-be"), r"a\.jsonl:1: byte 1 of the line is NUL", "iconv -f UTF-16"),
        ("a.csv", b"x,y\n1,2\n\n3,\x004\n", r"a\.csv:4: byte 3 of the line is NUL", "Remove it"),
        ("a.jsonl", b'{"x": 1}\n{"x": 2\n', r"a\.jsonl:2: not JSON: .* at column \d+", "One object"),
        ("a.jsonl", b'[\n{"x": 1}\n]\n', r"a\.jsonl:1: not JSON: ", "One object"),
        ("a.jsonl", b'{"x": 1} {"x": 2}\n', r"a\.jsonl:1: not JSON: Extra data at column 10", "One object"),
        ("a.jsonl", b'{"x": 1}\n["x"]\n', r"a\.jsonl:2: a list, not an object", "One object"),
        ("a.jsonl", b'{"x": ' + b"9" * 5000 + b"}\n", r"a\.jsonl:1: cannot be read: .*4300 digits", "One object"),
        ("a.jsonl", b'{"x": ' + b"[" * 200_000, r"a\.jsonl:1: (cannot be read: .*recursion|not JSON)", "One object"),
        ("a.parquet", b"PAR1 and no more PAR1", r"a\.parquet: (not a Parquet file|cannot be read)", "whole"),
        (
            "a.txt",
            b"fine\n",
            r"a\.txt: unknown kind of file",
            ".csv, .tsv, .jsonl, .json, .parquet, .conll, .bio, .iob",
        ),
    ],
)
def test_a_broken_file_is_told_by_file_and_line(tmp_path: Path, name: str, content: bytes, message: str, hint: str):
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path / name, content)
    assert hint in error.value.hint
    assert str(tmp_path) in error.value.message
    assert error.value.hint


def test_rows_before_a_broken_one_are_given(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"x,y\n1,2\n3\n")
    rows = readers.rows(str(path))
    assert next(rows) == (f"{path}:2", {"x": "1", "y": "2"})
    with pytest.raises(DataError, match=r"a\.csv:3"):
        next(rows)


def test_a_truncated_parquet_file_is_told(tmp_path: Path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"x": list(range(5000))}), path)
    with pytest.raises(DataError, match=r"a\.parquet: ") as error:
        read(path, path.read_bytes()[:-100])
    assert "whole" in error.value.hint


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        ("review.csv", r"^no file review\.csv \(did you mean 'reviews\.csv'\?\)$", "The current folder is"),
        ("REVIEWS.CSV", r"did you mean 'reviews\.csv'", "The current folder is"),
        ("quite-different", r"^no file quite-different$", "hub:quite-different"),
        ("owner/name", r"^no file owner/name: there is no folder owner", "hub:owner/name"),
        ("rotten-tomatoes", "^no file rotten-tomatoes$", "starter:rotten-tomatoes"),
        ("reuters-r8/test", "^no file reuters-r8/test$", "starter:reuters-r8/test"),
        ("data", "^data is a folder$", "'data/*.csv'"),
        ("*.tsv", r"^no file \*\.tsv", "The current folder is"),
        ("x" * 300 + ".csv", "^no file xxx", "The current folder is"),
        ("a\0b.csv", "^no file a\0b", "The current folder is"),
        ("~nobody-of-that-name/a.csv", "^no file ~nobody", "The current folder is"),
    ],
)
def test_a_source_that_is_no_file_is_told_with_what_is_near(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str, hint: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "reviews.csv").write_text("text\nfine\n")
    with pytest.raises(DataError, match=message) as error:
        list(readers.rows(source))
    assert hint in error.value.hint


def test_a_starter_model_is_no_data():
    with pytest.raises(DataError, match="starter:minilm-l6 is a model, not data") as error:
        list(readers.rows("starter:minilm-l6"))
    assert "model.base" in error.value.hint


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        ("starter:reuters-r8/tset", r"no split 'tset' \(did you mean 'test'\?\)", "It has train, test; the first is"),
        ("starter:imdb/test", "starter:imdb has no split 'test'", "It has train; "),
        ("starter:dialogs/germany", r"no split 'germany' \(did you mean 'german'\?\)", "It has english, "),
    ],
)
def test_a_split_that_a_starter_lacks_is_told(source: str, message: str, hint: str):
    with pytest.raises(DataError, match=message) as error:
        list(readers.rows(source))
    assert hint in error.value.hint


@pytest.mark.parametrize(
    ("source", "path", "name", "revision", "split"),
    [
        ("hub:imdb", "imdb", None, None, "train"),
        ("hub:stanfordnlp/imdb", "stanfordnlp/imdb", None, None, "train"),
        ("hub:stanfordnlp/imdb:test", "stanfordnlp/imdb", None, None, "test"),
        ("hub:nyu-mll/glue/sst2", "nyu-mll/glue", "sst2", None, "train"),
        ("hub:nyu-mll/glue/sst2:validation", "nyu-mll/glue", "sst2", None, "validation"),
        ("hub:nyu-mll/glue@main/sst2:validation", "nyu-mll/glue", "sst2", "main", "validation"),
        ("hub:imdb@e6281661:train[:10%]", "imdb", None, "e6281661", "train[:10%]"),
    ],
)
def test_a_hub_source_is_taken_apart(source: str, path: str, name: str | None, revision: str | None, split: str):
    assert readers.parse_hub(source) == {"path": path, "name": name, "revision": revision, "split": split}


WORD = st.from_regex(r"[A-Za-z0-9_.-]{1,8}", fullmatch=True)


@given(owner=WORD, name=WORD, revision=WORD, config=st.none() | WORD, split=st.none() | WORD)
def test_every_whole_hub_source_is_taken_apart(
    owner: str, name: str, revision: str, config: str | None, split: str | None
):
    source = f"hub:{owner}/{name}@{revision}" + (f"/{config}" if config else "") + (f":{split}" if split else "")
    wanted = {"path": f"{owner}/{name}", "name": config, "revision": revision, "split": split or "train"}
    assert readers.parse_hub(source) == wanted


@pytest.mark.parametrize("source", ["hub:", "hub::test", "hub:@main", "hub:imdb@", "hub:imdb@/config"])
def test_a_hub_source_without_its_parts_is_refused(source: str):
    with pytest.raises(DataError, match="is not hub:ID@revision/config:split") as error:
        readers.parse_hub(source)
    assert "hub:stanfordnlp/imdb" in error.value.hint


def test_hub_rows_have_the_names_of_their_labels(monkeypatch: pytest.MonkeyPatch):
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "n": datasets.Value("int32"),
        }
    )
    rows = {"text": ["fine", "dull", "untold", "none"], "label": [1, 0, -1, None], "n": [1, 0, -1, None]}
    asked: list[dict[str, Any]] = []

    def load_dataset(**parts: Any) -> datasets.Dataset:
        asked.append(parts)
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = "hub:owner/name@abc/config:test"
    assert list(readers.rows(source)) == [
        (f"{source}:row 1", {"text": "fine", "label": "pos", "n": 1}),
        (f"{source}:row 2", {"text": "dull", "label": "neg", "n": 0}),
        (f"{source}:row 3", {"text": "untold", "label": None, "n": -1}),
        (f"{source}:row 4", {"text": "none", "label": None, "n": None}),
    ]
    assert asked == [{"path": "owner/name", "name": "config", "revision": "abc", "split": "test"}]


def test_hub_rows_have_the_names_of_labels_in_lists(monkeypatch: pytest.MonkeyPatch):
    tags = datasets.List(datasets.ClassLabel(names=["O", "B-LOC"]))
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": tags})
    rows = {"tokens": [["in", "Rome"], []], "ner_tags": [[0, 1], []]}
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: datasets.Dataset.from_dict(rows, features=features))
    found = [row for _, row in readers.rows("hub:owner/name")]
    assert found == [{"tokens": ["in", "Rome"], "ner_tags": ["O", "B-LOC"]}, {"tokens": [], "ner_tags": []}]


def test_a_hub_data_set_that_cannot_be_had_offline_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DataError, match=r"^hub:owner/none-such: cannot be loaded: \w+Error: ") as error:
        list(readers.rows("hub:owner/none-such"))
    assert "HF_HUB_OFFLINE" in error.value.hint
    assert "\n" not in error.value.message
