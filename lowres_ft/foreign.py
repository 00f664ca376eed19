"""Files that others made: read within limits, and only from the folder that was named."""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from lowres_ft.errors import LowresError
from lowres_ft.sizes import show_bytes

_LARGEST_HEADER = 100_000_000  # bytes, as safetensors has it


def read_bytes(path: Path, most: int, kind: type[LowresError]) -> bytes:
    """The content of a file of at most `most` bytes.

    Raises:
        kind: It is larger, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            size = min(most, os.fstat(file.fileno()).st_size)  # room for `most` is not asked for
            content = file.read(size + 1)
            if len(content) > size:  # it grows, or says nothing of its size
                content += file.read(most - size)
    except OSError as error:
        raise kind(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(content) > most:
        raise kind(f"{path} is larger than {show_bytes(most)}", hint="No file of this kind is that large.")
    return content


def read_json(path: Path, most: int, kind: type[LowresError]) -> dict[str, Any]:
    """The object that a JSON file of at most `most` bytes holds.

    Raises:
        kind: It cannot be read, or is no object in JSON.
    """
    try:
        content = json.loads(read_bytes(path, most, kind).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # a number too long, or lists too deep, among it
        raise kind(f"{path}: cannot be read: {error}", hint="It is damaged: fetch it again.") from error
    if not isinstance(content, dict):
        raise kind(f"{path} is not an object in JSON", hint="It is damaged: fetch it again.")
    return content


def read_header(file: BinaryIO) -> dict[str, dict[str, Any]]:
    """What a safetensors file, open at its begin, says of each tensor; its data begin where the file then stands.

    Raises:
        ValueError: It is no such file.
    """
    if not 0 < (size := int.from_bytes(file.read(8), "little")) <= _LARGEST_HEADER:
        raise ValueError("no header of a safetensors file")
    header: dict[str, dict[str, Any]] = json.loads(file.read(size))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def require_inside(folder: Path, name: str, kind: type[LowresError]) -> Path:
    """The file called `name` in a folder, as far as its bytes lie in it too.

    In a snapshot of the Hub's cache, files are links to `blobs` of the same repository.

    Raises:
        kind: The name leads elsewhere, or is a link to what lies elsewhere.
    """
    path = folder / name
    plain = Path(name).name == name and not any(mark in name for mark in "\\\0") and 0 < len(os.fsencode(name)) < 256
    if not plain or name in (".", ".."):
        raise kind(f"{folder}: {name!r} is no name of a file of that folder", hint="Nothing else is read.")
    if path.is_symlink():
        home, place = folder.resolve(), path.resolve()
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
        if not place.is_relative_to(home) and not (blobs and place.is_relative_to(blobs)):
            raise kind(f"{path} is a link to {place}, outside of its folder", hint="Put the file itself there.")
    return path
