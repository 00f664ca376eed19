"""Files of others are read within limits."""

import tracemalloc
from pathlib import Path

import pytest

from lowres_ft import foreign
from lowres_ft.errors import ModelError

MIB = 2**20


def test_a_small_file_takes_little_whatever_it_might_hold(tmp_path: Path):
    """Room for the most that it may hold would count where what is mapped is limited."""
    path = tmp_path / "config.json"
    path.write_bytes(b"{}")
    tracemalloc.start()
    try:
        assert foreign.read_json(path, 64 * MIB, ModelError) == {}
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("most", [3 * MIB - 1, 3 * MIB, 3 * MIB + 1])
def test_a_file_holds_no_more_than_it_may(tmp_path: Path, most: int):
    path, content = tmp_path / "vocab.json", bytes(range(256)) * (3 * MIB // 256)
    path.write_bytes(content)
    if most >= len(content):
        assert foreign.read_bytes(path, most, ModelError) == content
        return
    with pytest.raises(ModelError, match=r"vocab.json is larger than 3.0 MiB"):
        foreign.read_bytes(path, most, ModelError)


def test_a_file_is_held_once(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(bytes(8 * MIB))
    tracemalloc.start()
    try:
        assert len(foreign.read_bytes(path, 64 * MIB, ModelError)) == 8 * MIB
        assert tracemalloc.get_traced_memory()[1] < 10 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="every file says its size here")
def test_a_file_that_says_nothing_of_its_size_is_read():
    assert b"VmRSS" in foreign.read_bytes(Path("/proc/self/status"), MIB, ModelError)
