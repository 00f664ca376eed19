"""A bound of memory: held to while it stands, and gone afterwards."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lowres_ft import allocator, limits
from lowres_ft.events import Note, unheard
from lowres_ft.outside import Outside

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA bounds memory on Linux alone")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


HELD = """
import resource, sys, torch
from functools import partial
from lowres_ft import allocator, limits, shortage
from lowres_ft.events import unheard

def fits(mib):
    try:
        torch.zeros(mib << 20, dtype=torch.uint8)
    except RuntimeError as error:
        assert shortage.ran_out(error)
        return False
    return True

def failing():
    raise KeyError("seen")

before = resource.getrlimit(resource.RLIMIT_DATA)
limits._start_threads()
most = allocator.resident() + (200 << 20)
with limits.held(most, "cpu", unheard):
    print(*(limits.apart(partial(fits, mib)) for mib in (100, 300, 100)), fits(300))
    held = torch.ones(120 << 20, dtype=torch.uint8)
    print(*(limits.apart(partial(fits, mib)) for mib in (60, 120)))
    del held
    print(limits.apart(partial(fits, 120)))
    try:
        limits.apart(failing)
    except KeyError as error:
        print(error.args[0])
    print(resource.getrlimit(resource.RLIMIT_DATA) == before)
print(limits.apart(partial(fits, 300)))
"""


@linux
def test_what_goes_beyond_the_bound_cannot_be_had_and_later_can():
    done = python(HELD)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == "True False True True True False True seen True True".split()


@linux
def test_a_limit_from_outside_stays():
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 8 << 30));"
        "from lowres_ft import limits; from lowres_ft.events import unheard\n"
        "with limits.held(100 << 30, 'cpu', unheard):\n"
        "    print(limits.apart(lambda: resource.getrlimit(resource.RLIMIT_DATA)))\n"
        "print(resource.getrlimit(resource.RLIMIT_DATA))"
    )
    assert python(code).stdout.splitlines() == [str((4 << 30, 8 << 30))] * 2


@linux
def test_a_process_that_takes_more_already_is_told():
    code = (
        "from lowres_ft import limits, errors\n"
        "try: limits.held(2**20, 'cpu', print).__enter__()\n"
        "except errors.OutOfMemoryError as error: print(error.message, [error.hint])"
    )
    told = python(code).stdout
    assert told.endswith("before the base is loaded, and may take 1.0 MiB ['']\n")  # so that remedies are added


INTERRUPTED = """
import os, resource, signal, sys, threading, time
from lowres_ft import limits, stopping
from lowres_ft.events import unheard

def work():
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    until = time.monotonic() + 60
    try:
        while time.monotonic() < until:
            time.sleep(0.01)
            limits.look()
    finally:
        time.sleep(0.3)
        ended.append(time.monotonic() < until)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it otherwise
if sys.argv[1] == "command":
    stopping.install()
before, ended = resource.getrlimit(resource.RLIMIT_DATA), []
with limits.held(100 << 30, "cpu", unheard):
    for _ in range(2 if sys.argv[1] == "library" else 1):
        try:
            limits.apart(work)
        except (KeyboardInterrupt, SystemExit) as error:
            print(type(error).__name__, ended.pop(), resource.getrlimit(resource.RLIMIT_DATA) == before)
    print(limits.apart(lambda: 7))
"""


@linux
@pytest.mark.parametrize(("where", "told"), [("library", 2 * ["KeyboardInterrupt"]), ("command", ["Stopped"])])
def test_an_interrupt_waits_until_what_computes_has_ended(where, told):
    done = python(INTERRUPTED, where)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [*(f"{kind} True True" for kind in told), "7"]


@linux
def test_what_the_system_limits_counts_where_a_run_looks(monkeypatch):
    taken = allocator.Taken(mapped=2000 * MIB, resident=500 * MIB, data=600 * MIB)
    monkeypatch.setattr(allocator, "taken", lambda: taken)
    monkeypatch.setattr(allocator, "resident", lambda: taken.resident)
    limits.Limit(700 * MIB, (Outside("RLIMIT_DATA", 632 * MIB), Outside("RLIMIT_AS", 2032 * MIB))).look()
    with pytest.raises(MemoryError, match="600 MiB are mapped, and 631 MiB may be, as RLIMIT_DATA says"):
        limits.Limit(700 * MIB, (Outside("RLIMIT_DATA", 631 * MIB),)).look()
    with pytest.raises(MemoryError, match=r"2.0 GiB are mapped, and 2.0 GiB may be, as RLIMIT_AS says"):
        limits.Limit(700 * MIB, (Outside("RLIMIT_AS", 2031 * MIB),)).look()
    with pytest.raises(MemoryError, match="500 MiB are resident, and 531 MiB may be"):
        limits.Limit(531 * MIB).look()


EXPECTING = """
import ctypes, os, resource, sys, threading
from lowres_ft import allocator, limits

if sys.argv[1] == "limit":
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, -1))
limits.expect(None if sys.argv[1] in ("none", "limit") else sys.argv[1])
told = os.environ.get("OPENBLAS_NUM_THREADS")
begun, ended = threading.Semaphore(0), threading.Event()

def work():
    held = ctypes.CDLL(None).malloc(100)  # by which a thread gets a heap of its own, if it is to have one
    begun.release()
    ended.wait()

before = allocator.taken()
for _ in range(4):
    threading.Thread(target=work).start()
    begun.acquire()
now = allocator.taken()
ended.set()
import numpy, scipy.linalg
from threadpoolctl import threadpool_info
print(told, (now.data - before.data) >> 20 > 16, (now.mapped - before.mapped) >> 20 > 128, allocator._tightened)
print(*(one["num_threads"] for one in threadpool_info() if "numpy" in one["filepath"]))
"""


@linux
@pytest.mark.parametrize(
    ("bound", "said", "told"),
    [
        ("none", "2", "2 True True False 2"),
        ("4GiB", None, "None False False True 1"),
        ("auto", "2", "2 False False True 2"),
        ("limit", None, "None False False False 1"),
    ],
)
def test_threads_of_a_run_with_a_bound_map_little(bound, said, told, monkeypatch):
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if said is not None:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", said)
    done = python(EXPECTING, bound)
    assert done.stdout.split() == told.split(), done.stderr


@linux
def test_what_is_left_lies_within_all_limits(monkeypatch):
    taken = allocator.Taken(mapped=2000 * MIB, resident=500 * MIB, data=600 * MIB)
    monkeypatch.setattr(allocator, "taken", lambda: taken)
    assert limits.left() is None
    monkeypatch.setattr(limits, "_limit", limits.Limit(700 * MIB))
    assert limits.left() == (700 - 500 - 32) * MIB
    monkeypatch.setattr(limits, "_limit", limits.Limit(700 * MIB, (Outside("RLIMIT_DATA", 650 * MIB),)))
    assert limits.left() == (650 - 600 - 32) * MIB


@linux
def test_a_child_has_what_a_bound_leaves_beside_this_process(monkeypatch):
    assert limits.room_beside() is None
    taken = allocator.Taken(mapped=9000 * MIB, resident=500 * MIB, data=600 * MIB)
    monkeypatch.setattr(allocator, "taken", lambda: taken)
    for most, room in ((700, 200 - 64), (550, 50 - 64)):
        monkeypatch.setattr(limits, "_limit", limits.Limit(most * MIB))
        assert limits.room_beside() == room * MIB


@linux
def test_a_child_has_what_limits_of_the_system_leave():
    code = """
import resource
from lowres_ft import allocator, limits
assert limits.room_beside() is None
for limit, taken in ((resource.RLIMIT_AS, "mapped"), (resource.RLIMIT_DATA, "data")):
    resource.setrlimit(limit, (getattr(allocator.taken(), taken) + 100 * 2**20, -1))
    print(95 < limits.room_beside() / 2**20 <= 100)
    resource.setrlimit(limit, (-1, -1))
"""
    done = python(code)
    assert done.stdout.split() == ["True", "True"], done.stderr


@linux
def test_a_bound_within_another_leaves_that_one(monkeypatch):
    monkeypatch.setattr(limits.Limit, "now", classmethod(lambda cls, most: cls(most)))
    with limits.held(2 << 30, "cpu", unheard):
        with limits.held(1 << 30, "cpu", unheard):
            assert limits._limit == limits.Limit(1 << 30)
        assert limits._limit == limits.Limit(2 << 30)
    assert not limits.held_now()


def test_what_arrow_keeps_is_given_back_where_arrow_is_there(monkeypatch):
    released = []
    pool = SimpleNamespace(release_unused=lambda: released.append(1))
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(default_memory_pool=lambda: pool))
    limits.trim()
    monkeypatch.delitem(sys.modules, "pyarrow")
    limits.trim()
    assert released == [1]


def test_a_gpu_s_share_is_what_the_context_leaves_and_is_given_back(monkeypatch):
    shares = []
    total = type("Properties", (), {"total_memory": 8 * 10**9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append((share, device))
    )
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: before[device], raising=False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: shares.append("emptied"))
    before = {"cuda:0": 1.0, "cuda:1": 0.5}
    with limits.held(limits.context() + 2 * 10**9, "cuda:1", unheard):
        assert shares == ["emptied", (0.25, "cuda:1")]
    assert shares[-1] == (0.5, "cuda:1")
    with limits.held(10**12, "cuda:0", unheard):
        assert shares[-1] == (1.0, "cuda:0")
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction")  # an older PyTorch
    with limits.held(limits.context() + 2 * 10**9, "cuda:1", unheard):
        pass
    assert shares[-1] == (1.0, "cuda:1")


def test_where_nothing_can_hold_a_process_that_is_told():
    heard: list[object] = []
    with limits.held(10**9, "mps", heard.append):
        pass
    assert [type(event) for event in heard] == [Note]
    with limits.held(None, "cpu", heard.append):
        assert limits.apart(lambda: 7) == 7
    assert len(heard) == 1
