"""A sample of `python -m tests.faults`: writes that fail, and a disk that is full."""

import errno
import os
from pathlib import Path

import pytest

from lowres_ft import checkpoint, files
from lowres_ft.errors import OutputError
from lowres_ft.files import draft, is_draft, write_bytes, writing
from tests import faults
from tests.faults import Setting


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("kind", faults.FUNCTIONS)
def test_a_failing_call_is_one_error_and_the_run_goes_on(setting: Setting, kind: str):
    count = setting.calls(kind)
    assert count > 10
    for failing in (0, count // 2, count - 1):
        assert setting.fail(kind, failing) is None, failing


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_a_full_disk_is_one_error_and_the_run_goes_on(setting: Setting, share: float):
    assert setting.fill(int(share * setting.largest)) is None


def test_a_folder_that_vanishes_is_one_error(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import shutil

    from lowres_ft.pipeline import run

    real = checkpoint.contents

    def vanish(*arguments: object) -> object:
        shutil.rmtree(tmp_path / "out.run")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "contents", vanish)
    with pytest.raises(OutputError, match="cannot be written"):
        run(setting.recipe, tmp_path / "out", device_name="cpu")
    monkeypatch.undo()
    assert run(setting.recipe, tmp_path / "out", device_name="cpu").folder.is_dir()
    assert os.listdir(tmp_path) == ["out"]


def test_what_killed_processes_left_is_removed_by_the_next_write(tmp_path: Path):
    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    stale = tmp_path / f".file.{files._host()}-{dead}.tmp"
    other_host = tmp_path / f".file.{'0' * 6}-{dead}.tmp"
    alive = tmp_path / f".file.{files._host()}-{os.getppid()}.tmp"
    for path in (stale, other_host, alive):
        path.write_bytes(b"half")
        assert is_draft(path.name)
    write_bytes(tmp_path / "file", b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["file", other_host.name, alive.name])


def test_a_draft_goes_whatever_happens(tmp_path: Path):
    def work() -> None:
        with draft(tmp_path / "a" / "place") as folder:
            (folder / "file").write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert os.listdir(tmp_path / "a") == []


def test_what_libraries_in_rust_say_is_told():
    words = f"I/O error: No space left on device (os error {errno.ENOSPC})"
    with pytest.raises(OutputError, match="place: cannot be written: No space left on device"), writing(Path("place")):
        raise RuntimeError(words)
    with pytest.raises(RuntimeError, match="a bug"), writing(Path("place")):
        raise RuntimeError("a bug")


def test_links_are_followed_and_what_is_no_file_is_written_to(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("file")
    write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink()
    write_bytes(Path(os.devnull), b"nothing")
    assert not Path(os.devnull).is_file()
