"""Rows from files, from starters and from the Hub, one at a time, each with the place where it stands."""

import glob
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowres_ft import assets, formats
from lowres_ft.errors import DataError, nearest
from lowres_ft.formats import Reader, Row, lines

__all__ = ["ENDINGS", "Row", "lines", "parse_hub", "rows"]
ENDINGS = tuple(formats.BY_ENDING)
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z")


def rows(source: str, progress: assets.Progress | None = None) -> Iterator[Row]:
    """Yield the rows of a source: `starter:NAME/SPLIT`, `hub:ID@revision/config:split`, a file, or a glob.

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
            yield from _file(path, str(path), formats.BY_ENDING.get(path.suffix.lower()))


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


def _file(path: Path, name: str, reader: Reader | None) -> Iterator[Row]:
    if reader is None:
        packed = " Unpack it first." if path.suffix.lower() in _PACKED else ""
        raise DataError(f"{name}: unknown kind of file", hint=f"Known are {', '.join(ENDINGS)}.{packed}")
    try:
        empty = True
        if path.is_file() and path.stat().st_size == 0:
            raise DataError(f"{name} is empty", hint="Was it saved, or is it still being downloaded?")
        for row in reader(path, name):
            empty = False
            yield row
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}", hint="Is the file whole?") from error
    if empty:
        raise DataError(f"{name} holds no rows", hint="A row stands on a line of its own, in a CSV below the header.")


def _starter(source: str, progress: assets.Progress | None) -> Iterator[Row]:
    name, _, split = source.partition("/")
    found = assets.starter(name)
    if found.is_model:
        raise DataError(f"starter:{name} is a model, not data", hint="Use it as model.base.")
    split = split or next(iter(found.splits))
    if split not in found.splits:
        told = f"starter:{name} has no split '{split}'{nearest(split, found.splits)}"
        raise DataError(told, hint=f"It has {', '.join(found.splits)}; the first is meant where none is named.")
    folder = assets.fetch(found.asset, progress)
    pattern = found.splits[split]
    for path in sorted(folder.glob(pattern)) or [folder / pattern]:
        reader = formats.BY_FORM.get(found.form) or formats.BY_ENDING[path.suffix]
        for where, row in _file(path, path.relative_to(folder).as_posix(), reader):
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
    """Rows of a Hub data set; labels stored as numbers with names, also in lists, become their names."""
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
        column: inner
        for column, feature in found.features.items()
        if isinstance(inner := getattr(feature, "feature", feature), datasets.ClassLabel)
    }
    for number, row in enumerate(found, start=1):
        for column, feature in names.items():
            value = row[column]
            row[column] = [_named(feature, one) for one in value] if isinstance(value, list) else _named(feature, value)
        yield f"{source}:row {number}", row


def _named(feature: Any, value: int | None) -> str | None:
    """The name of a label; None for one that is not given."""
    return feature.int2str(value) if value is not None and value >= 0 else None
