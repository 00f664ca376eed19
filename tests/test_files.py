"""Files: whole or not at all, with the umask's permissions, known by their hashes."""

import errno
import hashlib
import math
import os
import stat
from pathlib import Path

import pytest

from lowres_ft.errors import OutputError
from lowres_ft.files import cache_dir, cached_sha256, draft, publish, scratch, sha256, write_bytes, write_json


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_content_and_no_litter(function, tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OutputError, match="file: cannot be written: No space left on device") as caught:
        write_bytes(path, b"new")
    assert "--out" in caught.value.hint
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("place", ["missing/file", "folder"])
def test_a_place_that_takes_no_file_is_told(place, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=f"{place}: cannot be written"):
        write_bytes(tmp_path / place, b"new")
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_that_cannot_sync_folders_will_do(number, passes, tmp_path, monkeypatch):
    real = os.fsync

    def fail(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fail)
    if passes:
        write_bytes(tmp_path / "file", b"new")
        assert (tmp_path / "file").read_bytes() == b"new"
    else:
        with pytest.raises(OutputError, match="Input/output error"):
            write_bytes(tmp_path / "file", b"new")


@pytest.mark.usefixtures("umask")
def test_the_umask_decides_who_reads(tmp_path):
    write_bytes(tmp_path / "file", b"")
    assert mode(tmp_path / "file") == 0o640


def test_json_is_indented_utf8_that_other_programs_read(tmp_path):
    write_json(tmp_path / "a.json", {"text": "差评", "n": 1})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "text": "差评",\n  "n": 1\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", math.nan)
    assert "差评" in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.fixture
def finished(tmp_path) -> Path:
    """A folder whose files a library wrote for its owner alone."""
    folder = tmp_path / "work" / "made"
    (folder / "inner").mkdir(parents=True)
    for path in (folder / "a", folder / "inner" / "b"):
        path.write_bytes(b"content")
        path.chmod(0o600)
    folder.chmod(0o700)
    return folder


@pytest.mark.usefixtures("umask")
def test_publish_moves_a_folder_and_opens_it_to_the_group(finished, tmp_path):
    publish(finished, tmp_path / "place")
    assert not finished.exists()
    modes = {
        path.relative_to(tmp_path).as_posix(): mode(path)
        for path in [tmp_path / "place", *tmp_path.rglob("place/**/*")]
    }
    assert modes == {"place": 0o750, "place/a": 0o640, "place/inner": 0o750, "place/inner/b": 0o640}
    assert (tmp_path / "place" / "inner" / "b").read_bytes() == b"content"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_publish_replaces_nothing(kind, finished, tmp_path):
    place = tmp_path / "place"
    if kind == "file":
        place.write_text("mine")
    else:
        place.mkdir()
    with pytest.raises(OutputError, match="exists by now") as caught:
        publish(finished, place)
    assert "--out" in caught.value.hint
    assert (finished / "a").exists()
    assert place.read_text() == "mine" if kind == "file" else list(place.iterdir()) == []


def test_publish_needs_a_folder_to_publish_in(finished, tmp_path):
    with pytest.raises(OutputError, match="cannot be written: No such file or directory"):
        publish(finished, tmp_path / "missing" / "place")
    assert (finished / "a").exists()


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_scratch_is_empty_at_first_and_gone_afterwards(error, tmp_path):
    place = tmp_path / "a" / "scratch"
    place.mkdir(parents=True)
    (place / "left-over").touch()

    def use():
        with scratch(place) as folder:
            assert folder == place
            assert list(folder.iterdir()) == []
            (folder / "inner").mkdir()
            (folder / "inner" / "file").touch()
            if error:
                raise error

    if error:
        with pytest.raises(error):
            use()
    else:
        use()
    assert list((tmp_path / "a").iterdir()) == []


def test_scratch_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match="file/scratch: cannot be written: Not a directory"),
        scratch(tmp_path / "file" / "scratch"),
    ):
        pytest.fail("there is no such folder")


# Hashes


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """A file that changed long ago, and an empty cache."""
    monkeypatch.setenv("LOWRES_FT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "file"
    path.write_bytes(b"one")
    os.utime(path, ns=(10**18, 10**18))
    return path


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_hash_is_remembered_by_size_and_time(old):
    assert cached_sha256(old) == sha256(old) == digest(b"one")
    old.write_bytes(b"two")
    os.utime(old, ns=(10**18, 10**18))
    assert cached_sha256(old) == digest(b"one"), "it was not remembered"
    os.utime(old, ns=(10**18, 10**18 + 1))
    assert cached_sha256(old) == digest(b"two")
    old.write_bytes(b"three")
    os.utime(old, ns=(10**18, 10**18 + 1))
    assert cached_sha256(old) == digest(b"three")


def test_two_files_of_equal_size_and_time_are_two(old, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"two")
    os.utime(other, ns=(10**18, 10**18))
    assert (cached_sha256(old), cached_sha256(other)) == (digest(b"one"), digest(b"two"))


def test_a_file_that_changed_just_now_is_not_remembered(old):
    for content in (b"two", b"six", b"ten"):
        old.write_bytes(content)
        assert cached_sha256(old) == digest(content)
    assert not (cache_dir() / "hashes").exists()


def test_a_hash_that_was_cut_short_is_made_anew(old):
    cached_sha256(old)
    (memory,) = (cache_dir() / "hashes").iterdir()
    memory.write_text("abc")
    assert cached_sha256(old) == memory.read_text() == digest(b"one")


def test_a_cache_that_cannot_be_written_costs_time_only(old):
    cache_dir().touch()
    assert cached_sha256(old) == digest(b"one")


def test_the_cache_lies_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LOWRES_FT_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "mine"
    monkeypatch.setenv("LOWRES_FT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir().name == "lowres-ft"
    assert tmp_path in cache_dir().parents


def test_what_a_killed_process_of_the_same_number_left_is_no_hindrance(tmp_path):
    with draft(tmp_path / "out") as folder:
        name = folder
    name.mkdir()  # as in a container that began again
    (name / "old").touch()
    with draft(tmp_path / "out") as folder:
        assert (folder, list(folder.iterdir())) == (name, [])
        with pytest.raises(OutputError), draft(tmp_path / "out"):  # it is being worked on
            pass
        assert folder.is_dir()
