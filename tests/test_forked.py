"""Calls in a process of their own: what they give, what they leave, and what becomes of those that fail."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowres_ft import forked, limits

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the process calls by itself")
NOWHERE = "nowhere"  # a library that nobody has


def room(mib: int) -> int:
    """What a child may map which takes so many MiB more than this process."""
    return limits._taken()["VmData"] + mib * 2**20


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
        pytest.param(lambda: bytearray(200 * 2**20), "MemoryError()", id="takes too much"),
        pytest.param(lambda: 1 // 0, "ZeroDivisionError", id="raises something else"),
        pytest.param(lambda: os.kill(os.getpid(), signal.SIGSEGV), "died", id="dies as native code does"),
        pytest.param(lambda: time.sleep(60), "stood still", id="hangs"),
    ],
)
def test_within_a_room_the_process_does_not_call_what_a_child_could_not(fail, told):
    ours = os.getpid()
    with pytest.raises(forked.NoRoomError, match=re.escape(told)):
        forked.result(lambda: fail() if os.getpid() != ours else None, NOWHERE, idle=0.5, room=room(50))


@LINUX
def test_what_fits_into_a_room_is_computed():
    assert forked.result(lambda: len(bytearray(20 * 2**20)), NOWHERE, room=room(100)) == 20 * 2**20


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
    assert forked.result(os.getpid, brings="pytest") == os.getpid()


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
from lowres_ft import forked, limits
place = Path({str(place)!r})
forked.result(lambda: (place.with_suffix(".new").write_text(str(os.getpid())),
                       place.with_suffix(".new").rename(place), time.sleep(60)), "nowhere")
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
