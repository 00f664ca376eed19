"""Rows from files and from the Hub, one at a time, each with the place where it stands.

Our own readers, because a row that is too short, too long or not text must be told by file and line, and because a
file may be larger than memory.
"""

import csv
import glob
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowres_ft import assets
from lowres_ft.errors import DataError, nearest

Row = tuple[str, dict[str, Any]]
"""Where a row stands ("train.csv:17"), and its values by column."""

_LONGEST_FIELD = 1 << 24  # characters; an unclosed quote would otherwise swallow the rest of the file
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_AS_UTF8 = "Save the file as UTF-8 (from {0}: iconv -f {0} -t UTF-8)."
_OBJECTS = 'One object stands on each line, such as {"text": "Fine.", "label": "positive"}.'
_QUOTES = "A field that opens with a quote ends with one, and a quote inside it is doubled."
_CSV_PROBLEMS = {
    "end of data": ("the quote that opens here is never closed", _QUOTES),
    "field larger": (f"a field of more than {_LONGEST_FIELD:,} characters: is a quote never closed?", _QUOTES),
    "expected after": ("text follows the closing quote of a field", _QUOTES),
    "new-line character": ("a line ends in CR alone", "Save the file with the line ends LF or CRLF."),
}
"""What is in the csv module's messages, and what a user is told."""
ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")


def rows(source: str, progress: assets.Progress | None = None) -> Iterator[Row]:
    """Yield the rows of a source: `starter:NAME`, `hub:ID@revision/config:split`, a file, or a glob.

    Raises:
        DataError: There is no such file, or it cannot be read; the message names file and line.
        AssetError: A starter cannot be fetched.
    """
    if source.startswith("starter:"):
        yield from _starter(source.removeprefix("starter:"), progress)
    elif source.startswith("hub:"):
        yield from _hub(source)
    else:
        for path in _paths(source):
            yield from _file(path, str(path))


def _paths(source: str) -> list[Path]:
    path = Path(os.path.expanduser(source))  # os.path: a name that no system can have is a file that is not there
    if os.path.isdir(path):
        raise DataError(f"{source} is a folder", hint=f"Name a file, or a glob such as '{path / '*.csv'}'.")
    if os.path.exists(path):
        return [path]
    if found := sorted(glob.glob(str(path), recursive=True)):
        return [Path(name) for name in found]
    if source.partition("/")[0] in assets.STARTERS:
        raise DataError(f"no file {source}", hint=f"The starter of that name is data.train=starter:{source}.")
    try:
        reason = nearest(path.name, os.listdir(path.parent))
    except (OSError, ValueError):
        reason = f": there is no folder {path.parent}, or it cannot be read"
    hub = "" if path.suffix else f" A data set of the Hub is written hub:{source}."
    raise DataError(f"no file {source}{reason}", hint=f"The current folder is {Path.cwd()}.{hub}")


def _file(path: Path, name: str) -> Iterator[Row]:
    readers = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise DataError(f"{name}: unknown kind of file", hint=f"Known are {', '.join(ENDINGS)}.")
    try:
        empty = True
        if path.is_file() and path.stat().st_size == 0:
            raise DataError(f"{name} is empty", hint="Was it saved, or is it still being downloaded?")
        for row in readers[path.suffix.lower()](path, name):
            empty = False
            yield row
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}", hint="Is the file whole?") from error
    if empty:
        raise DataError(f"{name} holds no rows", hint="A row stands on a line of its own, in a CSV below the header.")


def lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file with their numbers; a byte order mark is passed over.

    Raises:
        DataError: A line is not UTF-8, or holds a NUL byte.
    """
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise DataError(f"{name}:1: the file is UTF-16, not UTF-8", hint=_AS_UTF8.format("UTF-16"))
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


def _csv(path: Path, name: str) -> Iterator[Row]:
    return _separated(path, name, ",")


def _tsv(path: Path, name: str) -> Iterator[Row]:
    return _separated(path, name, "\t")


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


def _header(values: list[str], where: str, delimiter: str) -> list[str]:
    header = [value.strip() for value in values]
    if twice := next((column for column in header if header.count(column) > 1), None):
        raise DataError(f"{where}: two columns are called '{twice}'", hint="Rename one of them.")
    other = max(_SEPARATORS, key=header[0].count)
    if len(header) == 1 and other in header[0]:
        raise DataError(
            f"{where}: the fields seem to be separated by {_SEPARATORS[other]}, not by {_SEPARATORS[delimiter]}",
            hint="Save it with commas as .csv, or with tabs as .tsv.",
        )
    return header


def _jsonl(path: Path, name: str) -> Iterator[Row]:
    for number, line in lines(path, name):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{name}:{number}: not JSON: {error.msg} at column {error.colno}", hint=_OBJECTS) from error
        except (ValueError, RecursionError) as error:  # a number too long, or lists too deep, for Python
            raise DataError(f"{name}:{number}: cannot be read: {error}", hint=_OBJECTS) from error
        if not isinstance(value, dict):
            raise DataError(f"{name}:{number}: a {type(value).__name__}, not an object", hint=_OBJECTS)
        yield f"{name}:{number}", value


def _parquet(path: Path, name: str) -> Iterator[Row]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}:row {number}", row
    except pa.ArrowException as error:
        raise DataError(f"{name}: not a Parquet file: {error}", hint="Is the file whole?") from error


def _starter(name: str, progress: assets.Progress | None) -> Iterator[Row]:
    found = assets.starter(name)
    if found.file is None:
        raise DataError(f"starter:{name} is a model, not data", hint="Use it as model.base.")
    folder = assets.fetch(found.asset, progress)
    for where, row in _file(folder / found.file, found.file):
        if all(row[column] == value for column, value in found.keep.items()):
            yield where, {column: value for column, value in row.items() if column not in found.keep}


def parse_hub(source: str) -> dict[str, str | None]:
    """Take `hub:ID@revision/config:split` apart; all but the ID may be left out, and the split is then `train`.

    Without a revision, `hub:owner/name/config` names a configuration by its third part.
    """
    rest, _, split = source.removeprefix("hub:").partition(":")
    name, at, tail = rest.partition("@")
    if at:
        revision, _, config = tail.partition("/")
    else:
        revision = ""
        parts = name.split("/")
        name, config = "/".join(parts[:2]), "/".join(parts[2:])
    if not name or (at and not revision):
        raise DataError(
            f"'{source}' is not hub:ID@revision/config:split",
            hint="All but the ID may be left out: hub:stanfordnlp/imdb is its split 'train'.",
        )
    return {"path": name, "name": config or None, "revision": revision or None, "split": split or "train"}


def _hub(source: str) -> Iterator[Row]:
    """Rows of a Hub data set; labels stored as numbers with names become their names."""
    import datasets

    parts = parse_hub(source)
    try:
        found = datasets.load_dataset(**parts)
    except Exception as error:
        raise DataError(
            f"{source}: cannot be loaded: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            hint="Check the name, the network and HF_HUB_OFFLINE; hub:ID@revision/config:split is the whole form.",
        ) from error
    names: Mapping[str, Any] = {
        column: feature for column, feature in found.features.items() if isinstance(feature, datasets.ClassLabel)
    }
    for number, row in enumerate(found, start=1):
        for column, feature in names.items():
            row[column] = feature.int2str(row[column]) if row[column] is not None and row[column] >= 0 else None
        yield f"{source}:row {number}", row
