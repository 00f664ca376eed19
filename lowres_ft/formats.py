"""Rows of one file, one function for each kind of file.

Our own readers, because a row that is too short, too long or not text must be told by file and line, and because a
file may be larger than memory.
"""

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from lowres_ft.errors import DataError, first_line

Row = tuple[str, dict[str, Any]]
"""Where a row stands ("train.csv:17"), and its values by column."""
Reader = Callable[[Path, str], Iterator[Row]]
"""Reads a file that messages call by a name."""

_LONGEST_FIELD = 1 << 24  # characters; an unclosed quote would otherwise swallow the rest of the file
_LONGEST_LINE = 1 << 27  # bytes; a file that is no text may be one line from end to end
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip, or a spreadsheet",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_AS_UTF8 = "Save the file as UTF-8 (from {0}: iconv -f {0} -t UTF-8)."
_WORDS = "On each line stands a word and its tag, with tabs or spaces between; a blank line ends a sentence."
_COMMENT = re.compile(r"# ([^=\s][^=]*=|new(doc|par)\s*$)")
"""What CoNLL-U and others write above a sentence; a line of a word `#` and its tags is none."""
_ARRAY = 'A .json file holds one array, such as [{"text": "Fine."}, ...]; one object on each line is a .jsonl file.'
_KINDS = {dict: "one object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"} | dict.fromkeys(
    (int, float), "a number"
)
_OBJECTS = 'One object stands on each line, such as {"text": "Fine.", "label": "positive"}.'
_QUOTES = "A field that opens with a quote ends with one, and a quote inside it is doubled."
_CSV_PROBLEMS = {
    "end of data": ("the quote that opens here is never closed", _QUOTES),
    "field larger": (f"a field of more than {_LONGEST_FIELD:,} characters: is a quote never closed?", _QUOTES),
    "expected after": ("text follows the closing quote of a field", _QUOTES),
    "new-line character": ("a line ends in CR alone", "Save the file with the line ends LF or CRLF."),
}
"""What is in the csv module's messages, and what a user is told."""


def lines(path: Path, name: str, *, longest: int = _LONGEST_LINE) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file with their numbers; a byte order mark is passed over.

    Raises:
        DataError: A line is not UTF-8, holds a NUL byte, or is longer than `longest` bytes.
    """
    with open(path, "rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(longest + 1), b""), start=1):
            if len(raw) > longest:
                raise DataError(
                    f"{name}:{number}: a line of more than {longest:,} bytes",
                    hint="Is it one row a line? A .json file of one array may be written on one line.",
                )
            if number == 1:
                if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise DataError(f"{name}:1: the file is UTF-16, not UTF-8", hint=_AS_UTF8.format("UTF-16"))
                if packed := next((kind for magic, kind in _PACKED.items() if raw.startswith(magic)), None):
                    raise DataError(f"{name}: the file is packed ({packed})", hint="Unpack it, and name what is in it.")
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if (at := raw.find(b"\0")) >= 0:
                raise DataError(
                    f"{name}:{number}: byte {at + 1} of the line is NUL, which no text holds",
                    hint=f"Remove it. If there are many, the file may be UTF-16: {_AS_UTF8.format('UTF-16')}",
                )
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{name}:{number}: byte {error.start + 1} of the line, 0x{raw[error.start]:02x}, is not UTF-8",
                    hint=_AS_UTF8.format("WINDOWS-1252"),
                ) from error


def _separated(path: Path, name: str, delimiter: str) -> Iterator[Row]:
    """Rows of a file with a header; a row that spans lines is named by its first one."""
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader((line for _, line in lines(path, name)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            told = [both for words, both in _CSV_PROBLEMS.items() if words in str(error)]
            message, hint = told[0] if told else (str(error), _QUOTES)
            raise DataError(f"{name}:{start}: {message}", hint=hint) from error
        if len(values) < 2 and not "".join(values).strip():
            continue
        if delimiter == "\t" and header and _swallowed(values, len(header)):
            raise DataError(
                f"{name}:{start}: the quote that opens here closes on line {reader.line_num}, with whole rows inside",
                hint=f"{_QUOTES} One at the start of a text that is not quoted is written as three.",
            )
        if header is None:
            header = _header(values, f"{name}:{start}", delimiter)
        elif len(values) != len(header):
            raise DataError(
                f"{name}:{start}: {len(values)} field{'s' * (len(values) != 1)}, but the header has {len(header)} "
                f"({', '.join(header)})",
                hint=f"Fields are separated by {_SEPARATORS[delimiter]}; a text that holds one, or a line break, "
                "stands in double quotes.",
            )
        else:
            yield f"{name}:{start}", dict(zip(header, values, strict=True))


def _swallowed(values: list[str], columns: int) -> bool:
    """Whether a field of a file with tabs seems to hold other rows: a quote of a text was taken for a field's.

    Then its first line ends a row, its last one begins one, and each between them has the tabs of one.
    """
    for place, value in enumerate(values):
        tabs = [line.count("\t") for line in value.split("\n")]
        between = [columns - 1] * (len(tabs) - 2)
        if columns > 1 and len(tabs) > 1 and tabs == [columns - 1 - place, *between, place]:
            return True
    return False


def _header(values: list[str], where: str, delimiter: str) -> list[str]:
    header = [value.strip() for value in values]
    _require_apart(header, where)
    other = max(_SEPARATORS, key=header[0].count)
    if len(header) == 1 and other in header[0]:
        raise DataError(
            f"{where}: the fields seem to be separated by {_SEPARATORS[other]}, not by {_SEPARATORS[delimiter]}",
            hint="Save it with commas as .csv, or with tabs as .tsv.",
        )
    return header


def _require_apart(columns: list[str], where: str) -> None:
    """Refuse columns of which two have one name."""
    if twice := next((column for column, count in Counter(columns).items() if count > 1), None):
        raise DataError(f"{where}: two columns are called '{twice}'", hint="Rename one of them.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        ValueError: Two of its values have one name.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"two values of an object are called '{twice}'")
    return found


def _jsonl(path: Path, name: str) -> Iterator[Row]:
    for number, line in lines(path, name):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            raise DataError(f"{name}:{number}: not JSON: {error.msg} at column {error.colno}", hint=_OBJECTS) from error
        except (ValueError, RecursionError) as error:  # a number too long, or lists too deep, for Python
            raise DataError(f"{name}:{number}: cannot be read: {error}", hint=_OBJECTS) from error
        if not isinstance(value, dict):
            raise DataError(f"{name}:{number}: a {type(value).__name__}, not an object", hint=_OBJECTS)
        yield f"{name}:{number}", value


def _json(path: Path, name: str) -> Iterator[Row]:
    """The objects of a file that holds one array of them; it is read as a whole."""
    try:
        whole = "".join(line for _, line in lines(path, name, longest=sys.maxsize - 1))
        values = json.loads(whole, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise DataError(f"{name}:{error.lineno}: not JSON: {error.msg} at column {error.colno}", hint=_ARRAY) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: cannot be read: {error}", hint=_ARRAY) from error
    if not isinstance(values, list):
        raise DataError(f"{name} holds {_KINDS[type(values)]}, not an array of objects", hint=_ARRAY)
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise DataError(f"{name}: item {number} is {_KINDS[type(value)]}, not an object", hint=_ARRAY)
        yield f"{name}: item {number}", value


def _parquet(path: Path, name: str) -> Iterator[Row]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            _require_apart(file.schema_arrow.names, name)
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}:row {number}", row
    except (
        pa.ArrowException,
        ValueError,
        OverflowError,
        MemoryError,
        RecursionError,
    ) as error:  # text that is not UTF-8, a date beyond all years
        raise DataError(f"{name}: not a Parquet file: {first_line(error)}", hint="Is the file whole?") from error


def _conll(path: Path, name: str) -> Iterator[Row]:
    """Sentences of a file with a word a line and blank lines between them.

    A row holds the first column as `words`, the last one as `tags`, and each column under its number from 1.
    """
    sentence: list[tuple[int, list[str]]] = []
    for number, line in lines(path, name):
        columns = _columns(line)
        apart = not columns or columns[0] == "-DOCSTART-"
        if not apart and (sentence or not _COMMENT.match(line)):
            sentence.append((number, columns))
        elif apart and sentence:
            yield _sentence(sentence, name)
            sentence = []
    if sentence:
        yield _sentence(sentence, name)


def _columns(line: str) -> list[str]:
    """The columns of a line, separated by single tabs where it has some, else by spaces."""
    line = line.strip(" \t\r\n")  # and no more: other spaces may be part of a word
    return [column.strip(" ") for column in line.split("\t")] if "\t" in line else [c for c in line.split(" ") if c]


def _sentence(sentence: list[tuple[int, list[str]]], name: str) -> Row:
    (width, _), *_ = Counter(len(columns) for _, columns in sentence).most_common(1)
    for number, columns in sentence:
        if len(columns) != width:
            raise DataError(
                f"{name}:{number}: {len(columns)} column{'s' * (len(columns) != 1)}, but its sentence, which begins on "
                f"line {sentence[0][0]}, has {width}",
                hint=_WORDS,
            )
        if not all(columns):
            raise DataError(f"{name}:{number}: column {columns.index('') + 1} is empty", hint=_WORDS)
    by_number = [[columns[place] for _, columns in sentence] for place in range(width)]
    row = {"words": by_number[0], "tags": by_number[-1]} if width > 1 else {"words": by_number[0]}
    return f"{name}:{sentence[0][0]}", row | {str(place): column for place, column in enumerate(by_number, start=1)}


def _orange(path: Path, name: str) -> Iterator[Row]:
    """Rows of one of Orange's .tab files: below the columns' names stand their types, then their roles."""
    found = _separated(path, name, "\t")
    _, (_, roles) = islice(found, 2)
    names = {column: "label" if role == "class" else column.lower() for column, role in roles.items()}
    for where, row in found:
        yield where, {names[column]: value.strip() for column, value in row.items()}


def _dialogs(path: Path, name: str) -> Iterator[Row]:
    """Conversations of a ChatterBot corpus file, whose utterances come from user and assistant in turn.

    A last question without an answer is cut off, and what is then no conversation is passed over.
    """
    # Nodes know their lines, and every scalar is text: a loader would make a number of "42" and a truth value of "no".
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    root = yaml.compose("".join(line for _, line in lines(path, name)), Loader=loader)
    assert isinstance(root, yaml.MappingNode)
    content = {key.value: value for key, value in root.value}
    for node in content["conversations"].value:
        if not isinstance(node, yaml.SequenceNode) or len(node.value) < 2:
            continue
        roles = ["user", "assistant"] * (len(node.value) // 2)
        messages = [
            {"role": role, "content": said.value.strip()} for role, said in zip(roles, node.value, strict=False)
        ]
        yield f"{name}:{node.start_mark.line + 1}", {"messages": messages, "topic": path.stem}


BY_ENDING: Mapping[str, Reader] = {
    ".csv": partial(_separated, delimiter=","),
    ".tsv": partial(_separated, delimiter="\t"),
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".conll": _conll,
    ".bio": _conll,
    ".iob": _conll,
}
"""What reads a user's file, by its ending."""
BY_FORM: Mapping[str, Reader] = {"conll": _conll, "orange": _orange, "dialogs": _dialogs}
"""What reads a starter's file, where its ending does not tell."""
