"""Large tensors are mapped by themselves, so that what is freed is given back."""

import subprocess
import sys

import pytest

from lowres_ft import allocator

GROWTH = """
import sys
from lowres_ft import allocator
import torch

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

torch.ones(2**20)
maps = allocator.settle() if sys.argv[1] == "settled" else False
before = resident()
kept = []
for _ in range(40):  # a small thing stays behind each large one, as in a run
    large = torch.ones(3 * 2**20, dtype=torch.uint8)
    kept.append(torch.ones(2**12, dtype=torch.uint8))
    larger = torch.ones(5 * 2**20, dtype=torch.uint8)
    del large, larger
print(maps, resident() - before < 2**22)
"""


@pytest.fixture
def system(monkeypatch, tmp_path):
    """What the system says of huge pages."""

    def say(setting):
        (tmp_path / "enabled").write_text(setting)
        monkeypatch.setattr(allocator, "_SETTING", tmp_path / "enabled")
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")

    return say


@pytest.mark.parametrize(
    ("setting", "has"),
    [("[always] madvise never", True), ("always [madvise] never", True), ("always madvise [never]", False)],
)
def test_huge_pages_are_there_unless_the_system_never_gives_them(setting, has, system):
    system(setting)
    assert allocator.has_huge_pages() is has


def test_they_are_not_asked_for_where_the_user_said_so(system, monkeypatch):
    system("[always] madvise never")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    assert not allocator.has_huge_pages()
    assert not allocator.settle()


def test_no_system_says_that_it_has_none(monkeypatch, tmp_path):
    monkeypatch.setattr(allocator, "_SETTING", tmp_path / "none")
    assert not allocator.has_huge_pages()


def test_what_the_user_told_malloc_stays(system, monkeypatch):
    system("[always] madvise never")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    assert not allocator.settle()


@pytest.mark.skipif(
    not allocator._SETTING.exists() or "[never]" in allocator._SETTING.read_text(),
    reason="the system has no huge pages",
)
def test_freed_memory_is_given_back():
    done = subprocess.run([sys.executable, "-c", GROWTH, "settled"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
