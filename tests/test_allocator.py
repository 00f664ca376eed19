"""Large tensors are mapped by themselves, so that what is freed is given back."""

import os
import subprocess
import sys

import pytest

from lowres_ft import allocator, evaluate, train
from tests.conftest import prepare, recipe

huge_pages = pytest.mark.skipif(
    not allocator._SETTING.exists() or "[never]" in allocator._SETTING.read_text(),
    reason="the system has no huge pages",
)
GROWTH = """
from lowres_ft import allocator
from lowres_ft.allocator import resident
import torch

torch.ones(2**20)
allocator.settle(768)
before = resident()
kept = []
for _ in range(40):  # a small thing stays behind each large one, as in a run
    large = torch.ones(3 * 2**20, dtype=torch.uint8)
    kept.append(torch.ones(2**12, dtype=torch.uint8))
    larger = torch.ones(5 * 2**20, dtype=torch.uint8)
    del large, larger
print(allocator.maps(768), resident() - before < 2**22)
"""


@pytest.fixture
def system(monkeypatch, tmp_path):
    """What the system says of huge pages, and whether PyTorch asks for them."""

    def say(setting, asks=True):
        (tmp_path / "enabled").write_text(setting)
        monkeypatch.setattr(allocator, "_SETTING", tmp_path / "enabled")
        monkeypatch.setattr(allocator, "_pytorch_asks", lambda: asks)
        allocator.has_huge_pages.cache_clear()

    yield say
    allocator.has_huge_pages.cache_clear()


@pytest.mark.parametrize(
    ("setting", "asks", "has"),
    [
        ("[always] madvise never", False, True),
        ("always [madvise] never", True, True),
        ("always [madvise] never", False, False),
        ("always madvise [never]", True, False),
    ],
)
def test_huge_pages_are_given_to_all_or_to_who_asks(setting, asks, has, system):
    system(setting, asks)
    assert allocator.has_huge_pages() is has


def test_a_system_that_says_nothing_has_none(system, monkeypatch, tmp_path):
    system("")
    monkeypatch.setattr(allocator, "_SETTING", tmp_path / "none")
    assert not allocator.has_huge_pages()
    assert not allocator.maps(768)


def test_tensors_of_narrow_models_stay_in_the_heap(system):
    system("[always] madvise never")
    assert allocator.maps(512)
    assert not allocator.maps(384)


def test_what_the_user_told_malloc_stays(system, monkeypatch):
    system("[always] madvise never")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    assert not allocator.maps(768)


@pytest.mark.parametrize("told", ["0", "1"])
def test_pytorch_asks_where_it_is_told_to(told):
    code = "from lowres_ft import allocator; print(allocator._pytorch_asks())"
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": told}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == str(told == "1")


def test_what_was_tightened_stays_so(system, monkeypatch):
    system("[always] madvise never")
    told = {}
    monkeypatch.setattr(allocator, "_tell", told.__setitem__)
    monkeypatch.setattr(allocator, "_tightened", False)
    allocator.settle(768)
    assert told[allocator._MMAP_THRESHOLD] == allocator.HUGE
    allocator.tighten()
    allocator.settle(768)
    assert told[allocator._MMAP_THRESHOLD] == allocator.MAPPED


def test_the_heap_is_tidied_as_often_as_that_costs_a_hundredth_of_the_time(monkeypatch):
    now, held, given = [100.0], [900e6], []

    def give_back():
        now[0] += 0.02
        held[0] -= 100e6
        given.append(now[0])

    monkeypatch.setattr(allocator, "_due", 0.0)
    monkeypatch.setattr(allocator, "give_back", give_back)
    monkeypatch.setattr(allocator, "resident", lambda: held[0])
    monkeypatch.setattr(allocator.time, "perf_counter", lambda: now[0])
    for _ in range(120):
        allocator.tidy()
        now[0] += 0.1
    # 0.02 s to give back and 0.036 s for the faults of 100 MB: once in 5.6 s
    assert [later - given[0] for later in given[1:]] == pytest.approx([5.7, 11.4], abs=0.2)


def test_what_lies_free_in_the_heap_goes_back_between_micro_batches_and_batches_of_an_evaluation(
    bases, reviews, tmp_path, monkeypatch
):
    ready = prepare(recipe(bases(), reviews), tmp_path / "work", micro_batch_tokens=32)
    tidied = []
    monkeypatch.setattr(allocator, "tidy", lambda: tidied.append(1))
    state = train.start(ready.recipe, ready.adapted, ready.tokens["train"], ready.plan)
    next(train.train(state, ready.tokens["train"], ready.plan, ready.machine))
    assert len(tidied) > 1
    steps = len(tidied)
    evaluate.outputs(ready.adapted, ready.tokens["validation"], ready.plan)
    assert len(tidied) > steps


# Begun again

BEGUN = (
    "import os, sys; from lowres_ft import allocator; allocator.restart();"
    "told = [os.environ.get(name, '') for name in ('GLIBC_TUNABLES', 'THP_MEM_ALLOC_ENABLE')];"
    "print(*told, allocator.sets_aside(), 'torch' in sys.modules, *sys.argv[1:], sep='|')"
)
OURS = ":".join((*allocator._ASIDE, allocator._HEAP))
glibc = pytest.mark.skipif(not allocator.tightens(), reason="malloc is not glibc's")


def begun(*arguments, **environment):
    """What a process says that begins itself again."""
    kept = {name: value for name, value in os.environ.items() if name not in (allocator._TUNABLES, allocator._PAGES)}
    command = [sys.executable, "-X", "utf8", "-c", BEGUN, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=kept | environment)
    assert done.stdout.count("\n") == 1
    return done.stdout.strip().split("|")


@glibc
def test_a_process_begins_again_with_the_words_it_was_given():
    assert begun("two words", "", "--a=*") == [OURS, "", "False", "False", "two words", "", "--a=*"]


@glibc
def test_what_else_the_user_said_stays():
    told, pages, *_ = begun(GLIBC_TUNABLES="glibc.malloc.check=1", THP_MEM_ALLOC_ENABLE="1")
    assert (told, pages) == (f"glibc.malloc.check=1:{OURS}", "1")


@glibc
@pytest.mark.parametrize(
    ("told", "aside"),
    [
        ({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=3"}, "True"),
        ({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"}, "False"),
        ({"MALLOC_MMAP_THRESHOLD_": "1000000"}, "True"),
    ],
)
def test_a_process_whose_malloc_was_told_otherwise_does_not_begin_again(told, aside):
    pages = "1" if aside == "True" else ""
    assert begun(**told) == [told.get("GLIBC_TUNABLES", ""), pages, aside, "False"]


def test_a_process_stays_where_malloc_is_not_to_be_told(monkeypatch):
    monkeypatch.setattr(allocator, "tightens", lambda: False)
    monkeypatch.setattr(allocator.os, "execv", lambda *_: pytest.fail("it began again"))
    monkeypatch.delenv(allocator._TUNABLES, raising=False)
    allocator.restart()
    assert allocator._TUNABLES not in os.environ


def test_what_a_process_says_to_itself_comes_too_late(monkeypatch, tmp_path):
    monkeypatch.setattr(allocator, "_BEGAN", tmp_path / "environ")
    assert allocator.sets_aside()  # a system that does not tell
    ended = OURS.replace(":", "\0")  # as glibc leaves it once it has read it
    for began, aside in [
        ("A=1", True),
        (f"A=1\0GLIBC_TUNABLES=x=y:{OURS}\0B=2", False),
        (f"GLIBC_TUNABLES={ended}", False),
    ]:
        (tmp_path / "environ").write_text(began)
        monkeypatch.setenv("GLIBC_TUNABLES", OURS)
        assert allocator.sets_aside() is aside


def test_tensors_of_wide_models_stay_in_a_heap_that_sets_nothing_aside(system, monkeypatch):
    system("[always] madvise never")
    monkeypatch.setattr(allocator, "sets_aside", lambda: False)
    assert not allocator.maps(768)


HELD = """
import sys
from lowres_ft import allocator
if sys.argv[1] == "none":
    allocator.restart()
import torch
torch.ones(2**22)
kept, before = [], allocator.resident()
for size in range(10**6, 10**6 + 640, 16):  # where blocks of one size happen to lie, little may be set aside of them
    layers = []
    for _ in range(12):
        first, second = (torch.ones(size, dtype=torch.uint8) for _ in "ab")
        kept += [torch.empty(1) for _ in range(4)]  # small things that stay
        layers.append(torch.ones(size, dtype=torch.uint8))
        del first, second
        kept += [torch.empty(1) for _ in range(4)]
    del layers
print(allocator.resident() - before)
"""


@glibc
def test_what_is_not_set_aside_leaves_room_for_its_like():
    grown = {}
    for aside in ("none", "some"):
        command = [sys.executable, "-c", HELD, aside]
        grown[aside] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown["none"] < 50e6  # of 36 MB at a time
    assert grown["some"] > 5 * grown["none"]
