"""Rows from files and from the Hub, one at a time, each with the place where it stands.

Our own readers, because a row that is too short, too long or not text must be told by file and line, and because a
file may be larger than memory.
"""

import csv
import glob
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowres_ft import assets
from lowres_ft.errors import DataError, nearest

Row = tuple[str, dict[str, Any]]
"""Where a row stands ("train.csv:17"), and its values by column."""

_LONGEST_FIELD = 1 << 24  # characters; an unclosed quote would otherwise swallow the rest of the file
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
    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError(f"{source} is a folder", hint=f"Name a file, or a glob such as '{source}/*.csv'.")
    if path.exists():
        return [path]
    if found := sorted(glob.glob(str(path), recursive=True)):
        return [Path(name) for name in found]
    if source.partition("/")[0] in assets.STARTERS:
        raise DataError(f"no file {source}", hint=f"The starter of that name is data.train=starter:{source}.")
    beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    raise DataError(f"no file {source}{nearest(path.name, beside)}", hint=f"The current folder is {Path.cwd()}.")


def _file(path: Path, name: str) -> Iterator[Row]:
    readers = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise DataError(f"{name}: unknown kind of file", hint=f"Known are {', '.join(ENDINGS)}.")
    try:
        empty = True
        for row in readers[path.suffix.lower()](path, name):
            empty = False
            yield row
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error
    if empty:
        held = "is empty" if path.stat().st_size == 0 else "holds no rows"
        raise DataError(f"{name} {held}")


def lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file with their numbers; a byte order mark is passed over.

    Raises:
        DataError: A line is not UTF-8.

    """
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise DataError(f"{name}:1: the file is UTF-16", hint="Save it as UTF-8.")
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = raw[error.start]
                raise DataError(
                    f"{name}:{number}: byte 0x{byte:02x} at column {error.start + 1} is not UTF-8",
                    hint="Save the file as UTF-8 (from Windows-1252: iconv -f WINDOWS-1252 -t UTF-8).",
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
            raise DataError(
                f"{name}:{start}: {error}",
                hint="A field that opens with a quote ends with one; a quote inside is doubled; lines end in LF",
            ) from error
        if not values:
            continue
        if header is None:
            header = _header(values, f"{name}:{start}", delimiter)
        elif len(values) != len(header):
            raise DataError(
                f"{name}:{start}: {len(values)} field{'s' * (len(values) != 1)}, but the header has {len(header)} "
                f"({', '.join(header)})",
                hint="A text that holds the separator stands in double quotes.",
            )
        else:
            yield f"{name}:{start}", dict(zip(header, values, strict=True))


def _header(values: list[str], where: str, delimiter: str) -> list[str]:
    header = [value.strip() for value in values]
    if twice := next((column for column in header if header.count(column) > 1), None):
        raise DataError(f"{where}: two columns are called '{twice}'", hint="Rename one of them.")
    if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0] and mark != delimiter), None)):
        raise DataError(
            f"{where}: the fields seem to be separated by {other!r}, not by {delimiter!r}",
            hint="Save it with commas as .csv, or with tabs as .tsv.",
        )
    return header


def _jsonl(path: Path, name: str) -> Iterator[Row]:
    for number, line in lines(path, name):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{name}:{number}: not JSON: {error}", hint="One object a line.") from error
        if not isinstance(value, dict):
            raise DataError(f"{name}:{number}: a {type(value).__name__}, not an object", hint="One object a line.")
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
        raise DataError(f"{name}: not a Parquet file: {error}") from error


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
        raise DataError(f"'{source}' is not hub:ID@revision/config:split")
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
