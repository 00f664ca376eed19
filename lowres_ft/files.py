"""Writing and naming files: atomically, with the umask's permissions, and by their hashes."""

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lowres_ft.errors import OutputError

_SETTLED = 2.0  # seconds; the coarsest clock of a common file system


def cache_dir() -> Path:
    """Where starter assets and hashes are kept: `LOWRES_FT_CACHE`, else the platform's user cache."""
    if place := os.environ.get("LOWRES_FT_CACHE"):
        return Path(place).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("lowres-ft")


def write_bytes(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file so that it holds either its old content or all of `data`, which may come in parts.

    A link is followed; what is no file, such as /dev/stdout, is written to as it is.

    Raises:
        OutputError: The disk or the folder does not allow it.
    """
    parts = [data] if isinstance(data, bytes) else data
    with writing(path):
        path = Path(os.path.realpath(path))
        if path.exists() and not path.is_file() and not path.is_dir():
            with open(path, "wb") as stream:
                stream.writelines(parts)
            return
        temporary = _draft_name(path)
        try:
            with open(temporary, "wb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def _draft_name(place: Path) -> Path:
    """Where this process makes what shall stand at `place`; what killed ones left there is removed."""
    remove_stale(place)
    return place.with_name(f".{place.name}.{_host()}-{os.getpid()}.tmp")


def is_draft(name: str) -> bool:
    """Whether a file or folder of this name is one that `write_bytes` or `draft` had not finished."""
    return re.fullmatch(r"\..+\.[0-9a-f]{6}-\d+\.tmp", name) is not None


def remove_stale(place: Path) -> None:
    """Remove what processes of this host that were killed left of their work on `place`."""
    ours = re.compile(re.escape(f".{place.name}.{_host()}-") + r"(\d+)\.tmp")
    with suppress(OSError):  # it is tried again the next time
        for entry in os.scandir(place.parent):
            if (found := ours.fullmatch(entry.name)) and not _runs(int(found[1])):
                remove(Path(entry.path))


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:6]


def _runs(process: int) -> bool:
    import psutil

    return bool(psutil.pid_exists(process))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinities are refused: other programs cannot read them."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def sync(folder: Path) -> None:
    """Make renames in `folder` durable, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
                raise
        finally:
            os.close(handle)


@contextmanager
def writing(path: Path, *, hint: str = "Make room or choose another place with --out.") -> Iterator[None]:
    """Turn an OSError inside into an OutputError that names `path`; also one that a library in Rust tells in words."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise OutputError(f"{path}: cannot be written: {why}", hint=hint) from error
    except Exception as error:
        if told := re.search(r"\(os error (\d+)\)", str(error)):
            why = os.strerror(int(told[1]))
            raise OutputError(f"{path}: cannot be written: {why}", hint=hint) from error
        raise


_drafts: set[Path] = set()  # of this process, while it works on them


@contextmanager
def draft(place: Path) -> Iterator[Path]:
    """A new folder beside `place` to make what shall stand there, until `publish` moves it; else it goes afterwards."""
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        folder = _draft_name(place)
        if folder not in _drafts:  # in a container that began again, this process may be called as one that was killed
            remove(folder)
        folder.mkdir()
        _drafts.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _drafts.discard(folder)


def publish(folder: Path, place: Path) -> None:
    """Make a finished folder appear at `place`, whole or not at all; every file gets the umask's permissions.

    Raises:
        OutputError: Something stands at `place`, or it cannot be written.
    """
    umask = os.umask(0)
    os.umask(umask)
    with writing(place):
        for path in [folder, *folder.rglob("*")]:
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
            if path.is_dir():
                sync(path)
            else:
                sync_file(path)
        if place.exists():
            raise OutputError(f"{place} exists by now", hint="Choose another place with --out.")
        os.rename(folder, place)
        sync(place.parent)


def sync_file(path: Path) -> None:
    """Make the content of a file that a library wrote durable."""
    with open(path, "r+b") as file:  # Windows syncs only what can be written
        os.fsync(file.fileno())


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A new empty folder that is gone afterwards, whatever happens."""
    with writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sha256(path: Path) -> str:
    """Hash of a file's content, read once."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_sha256(path: Path) -> str:
    """Like `sha256`, but remembered in the cache by path, size and time of change.

    A file that changed just now is not remembered: it could change again without its time telling.
    """
    stat = path.stat()
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    memory = cache_dir() / "hashes" / hashlib.sha256(key.encode()).hexdigest()
    if memory.is_file() and len(known := memory.read_text()) == 64:
        return known
    digest = sha256(path)
    if time.time() - stat.st_mtime > _SETTLED:
        with suppress(OSError, OutputError):  # a cache that cannot be written only costs time
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(memory, digest.encode())
    return digest
