"""Calls in a process of their own: what they give, what they leave, and what becomes of those that fail."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowres_ft import forked
from lowres_ft.forked import Library

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the process calls by itself")
NOWHERE = Library("nowhere", lambda: None, 0)
MIB = 2**20


@LINUX
def test_a_call_leaves_nothing_in_its_process():
    seen = []
    assert forked.result(lambda: seen.append(1) or (os.getpid(), "x" * 1_000_000), NOWHERE)[0] != os.getpid()
    assert not seen
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_what_a_call_raises_is_raised_here():
    with pytest.raises(ZeroDivisionError):
        forked.result(lambda: 1 // 0, NOWHERE)


@LINUX
@pytest.mark.parametrize(
    "fail",
    [
        pytest.param(lambda: os.kill(os.getpid(), signal.SIGKILL), id="killed"),
        pytest.param(lambda: os._exit(0), id="ends without an answer"),
        pytest.param(lambda: time.sleep(60), id="hangs"),
    ],
)
def test_where_a_child_fails_the_process_calls(fail):
    ours = os.getpid()
    began = time.monotonic()
    assert forked.result(lambda: ours if os.getpid() == ours else fail(), NOWHERE, idle=0.5) == ours
    assert time.monotonic() - began < 30


@LINUX
@pytest.mark.parametrize(
    ("fail", "told"),
    [
        pytest.param(lambda: bytearray(200 * MIB), "MemoryError()", id="takes too much"),
        pytest.param(lambda: 1 // 0, "ZeroDivisionError", id="raises something else"),
        pytest.param(lambda: os.kill(os.getpid(), signal.SIGSEGV), "died", id="dies as native code does"),
        pytest.param(lambda: time.sleep(60), "stood still", id="hangs"),
    ],
)
def test_within_a_room_the_process_does_not_call_what_a_child_could_not(fail, told):
    ours = os.getpid()
    with pytest.raises(forked.NoRoomError, match=re.escape(told)):
        forked.result(lambda: fail() if os.getpid() != ours else None, NOWHERE, idle=0.5, room=50 * MIB)


def spin() -> None:
    """Ask the system again and again, as a library may that gets no memory; a minute stands for ever."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        Path("/proc/self/smaps").read_bytes()


@LINUX
def test_a_library_that_asks_for_ever_is_ended():
    began = time.monotonic()
    with pytest.raises(forked.NoRoomError, match="stood still"):
        forked.result(spin, NOWHERE, idle=2.0, room=50 * MIB)
    assert time.monotonic() - began < 30


@LINUX
def test_where_a_library_takes_more_than_there_is_nothing_begins():
    with pytest.raises(forked.NoRoomError, match="60 MiB, where nowhere alone takes 90 MiB"):
        forked.result(lambda: None, NOWHERE._replace(begin=spin, takes=90 * MIB), room=60 * MIB)
    wide = Library("nowhere", lambda: HELD.append(b"x" * (60 * MIB)), 10 * MIB)
    with pytest.raises(forked.NoRoomError, match="nowhere alone takes 60 MiB"):
        forked.result(lambda: None, wide, room=50 * MIB)
    assert forked.result(lambda: len(HELD), wide, room=90 * MIB) == 1


HELD: list[bytes] = []


@LINUX
def test_openblas_keeps_its_work_space_and_never_asks_for_ever():
    """In a process of its own, as scikit-learn may be here."""
    code = f"""
import numpy as np
from lowres_ft import forked

def learn():
    from sklearn.linear_model import LogisticRegression
    x = np.random.default_rng(0).normal(size=(400, 300))
    found = LogisticRegression(max_iter=20).fit(x, x[:, 0] > 0).score(x, x[:, 0] > 0)
    try:
        many = np.ones((6000, 6000)) @ np.ones((6000, 6000))
    except MemoryError:
        return found
    return "nothing was refused"

print(forked.result(learn, forked.SCIKIT_LEARN, room=200 * {MIB}))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=100)
    assert float(done.stdout) > 0.8, done.stderr


@LINUX
def test_scikit_learn_takes_no_more_than_is_said():
    code = """
from lowres_ft import deferred
deferred.begin()  # as a command does
import lowres_ft.pipeline, transformers
from lowres_ft import allocator, forked
before = allocator.written()
forked.SCIKIT_LEARN.begin()
print(allocator.written() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < forked.SCIKIT_LEARN.takes


@LINUX
def test_a_report_is_drawn_in_a_child_as_here_and_takes_no_more_than_is_said(trained):
    code = """
import json, sys
from functools import partial
from pathlib import Path
import lowres_ft.pipeline
from lowres_ft import allocator, forked, page
found = json.loads(Path(sys.argv[1]).read_bytes())
drawn = forked.result(partial(page.render, found), brings=forked.MATPLOTLIB, room=200 << 20)
print("matplotlib" in sys.modules)
before = allocator.written()
print(page.render(found) == drawn)
print(allocator.written() - before)
"""
    report = trained("bert").folder / "report.json"
    done = subprocess.run([sys.executable, "-c", code, str(report)], capture_output=True, text=True, check=True)
    *told, taken = done.stdout.split()
    assert told == ["False", "True"]
    assert int(taken) < forked.MATPLOTLIB.takes


@LINUX
def test_what_fits_into_a_room_is_computed():
    assert forked.result(lambda: len(bytearray(20 * MIB)), NOWHERE, room=100 * MIB) == 20 * MIB


@LINUX
def test_what_cannot_be_pickled_is_made_here():
    assert forked.result(lambda: lambda: 3, NOWHERE)() == 3


@LINUX
def test_a_child_that_computes_may_take_its_time():
    def busy() -> int:
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            pass
        return os.getpid()

    assert forked.result(busy, NOWHERE, idle=0.5) != os.getpid()


def test_where_the_library_is_here_the_process_calls():
    assert forked.result(os.getpid, brings=Library("pytest", lambda: None, 0)) == os.getpid()


@LINUX
def test_an_interrupt_ends_the_child(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(forked, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        forked.result(lambda: time.sleep(60), NOWHERE)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@LINUX
def test_a_child_ends_with_its_parent(tmp_path: Path):
    place = tmp_path / "child"
    code = f"""
import os, time
from pathlib import Path
from lowres_ft import forked
place = Path({str(place)!r})
forked.result(lambda: (place.with_suffix(".new").write_text(str(os.getpid())),
                       place.with_suffix(".new").rename(place), time.sleep(60)),
              forked.Library("nowhere", lambda: None, 0))
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    child = int(_waited(lambda: place.exists() and place.read_text()))
    parent.kill()
    parent.wait()
    assert _waited(lambda: not _runs(child))


def _waited(found, seconds=30.0):
    until = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return answer


def _runs(pid: int) -> bool:
    """Whether a process is there and did not end; one that nobody waited for stays as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
