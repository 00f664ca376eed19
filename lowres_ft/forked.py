"""A call in a process of its own, so that the libraries and the memory that it needs are gone when it has ended.

The child is forked and has what this process has, but none of its threads. So it is for calls that compute with
neither PyTorch nor tokenizers, whose pools of threads may have begun.
"""

import contextlib
import ctypes
import os
import pickle
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lowres_ft import allocator, limits
from lowres_ft.sizes import show_bytes

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl
_IDLE = 10.0  # seconds; a child that computes nothing for so long is taken to hang
_BUSY, _BUSY_IN_ROOM = 0.0, 0.1  # share of them that a child computes by itself else; the system's time does not count
_CHUNK = 2**16
_SAID = 200  # characters of an error


class NoRoomError(Exception):
    """There is too little room for a child, or it failed within it; it says by what, where it could."""


class Library(NamedTuple):
    """A library that is to be gone when a child has ended."""

    name: str
    begin: Callable[[], None]
    """Imports it, and lets it have what it cannot go without later."""
    takes: int
    """Bytes that it has then, but for its code, which lies in files."""


def _begin_scikit_learn() -> None:
    """Import what is used of it, and multiply once by each copy of OpenBLAS, which then keeps its work space.

    A copy that gets none asks for ever, when it is imported and later (`blas_memory_alloc`).
    """
    import numpy as np
    import scipy.linalg
    import sklearn.feature_extraction.text
    import sklearn.linear_model  # noqa: F401 (to be there)

    limits.start_products()
    square = np.ones((256, 256))
    scipy.linalg.blas.dgemm(1.0, square, square)


SCIKIT_LEARN = Library("sklearn", _begin_scikit_learn, 90 * 2**20)  # 84 MiB were measured in a command, and 50 of code


def _begin_matplotlib() -> None:
    """Import what draws a report."""
    import matplotlib.backends.backend_svg
    import matplotlib.figure
    import matplotlib.ticker  # noqa: F401 (to be there)


MATPLOTLIB = Library("matplotlib", _begin_matplotlib, 30 * 2**20)  # 24 MiB were measured with a report


def result(call: Callable[[], Any], brings: Library, idle: float = _IDLE, *, room: int | None = None) -> Any:
    """What a call gives, which can be pickled, from a child; this process calls it where no child could.

    That is so off Linux; where the library that it `brings` is here already, so that nothing is saved, and its threads
    may have begun; and where the child fails, dies or stands still for `idle` seconds: what it would raise is then
    raised here. With a `room`, the bytes that a child may have beside those that it begins with, code not counted, a
    call that fails there is not made here, where it would take as much: libraries that get no memory raise whatever
    they do, or try for ever.

    Raises:
        NoRoomError: The child failed within its room, or the library alone takes more.
    """
    possible = sys.platform == "linux" and brings.name not in sys.modules
    if possible and room is not None and room < brings.takes:
        raise NoRoomError(f"{show_bytes(max(0, room))}, where {brings.name} alone takes {show_bytes(brings.takes)}")
    found = _of_child(call, brings, idle, room) if possible else None
    return call() if found is None else found[0]


def _of_child(call: Callable[[], Any], brings: Library, idle: float, room: int | None) -> tuple[Any] | None:
    """What the call gives in a child; None where that fails.

    Raises:
        NoRoomError: That is so, within a room.
    """
    ours, theirs = os.pipe()
    parent = os.getpid()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child has none of
            child = os.fork()
    except OSError:  # no room for a process
        os.close(ours)
        os.close(theirs)
        if room is not None:
            raise NoRoomError("there is none for a process") from None
        return None
    if child == 0:
        _work(call, brings, theirs, parent, room)
    os.close(theirs)
    answer = None
    try:
        answer = _read(ours, child, idle, (_BUSY if room is None else _BUSY_IN_ROOM) * idle)
    finally:
        os.close(ours)
        if answer is None:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if answer and not status:
        return (pickle.loads(answer),)  # noqa: S301 (this process wrote it)
    if room is not None:
        raise NoRoomError(answer.decode(errors="replace") if answer else "it died, or stood still")
    return None


def _work(call: Callable[[], Any], brings: Library, to: int, parent: int, room: int | None) -> None:
    """Call, write what it gives, and end without what a process does at its end: that is the parent's to do."""
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        # With its parent it ends, whose locks it has too.
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() == parent:
            if room is not None:
                _hold(brings, room)
            answer = pickle.dumps(call())
            with os.fdopen(to, "wb") as file:
                file.write(answer)
            code = 0
    except BaseException as error:  # noqa: BLE001 (the parent calls, and tells what is raised)
        if room is not None:
            with contextlib.suppress(BaseException):
                os.write(to, repr(error)[:_SAID].encode())
    finally:
        os._exit(code)


def _hold(brings: Library, room: int) -> None:
    """Let a library begin, and then this process have what that leaves of its room.

    Raises:
        MemoryError: It leaves nothing.
    """
    import resource

    first = allocator.written()
    brings.begin()
    if (taken := allocator.written() - first) >= room:
        raise MemoryError(f"{brings.name} alone takes {show_bytes(taken)}")
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    data = limits.Limit(allocator.resident() + room - taken).data
    resource.setrlimit(resource.RLIMIT_DATA, (data if soft == resource.RLIM_INFINITY else min(soft, data), hard))


def _read(source: int, child: int, idle: float, busy: float) -> bytes | None:
    """All that the child writes until it ends; None where it computes for no more than `busy` of `idle` seconds."""
    found, spent, until = bytearray(), 0.0, time.monotonic() + idle
    while time.monotonic() < until:
        if select.select([source], [], [], min(1.0, idle))[0]:
            if not (chunk := os.read(source, _CHUNK)):
                return bytes(found)
            found += chunk
        if (now := _computed(child)) > spent + busy:
            spent, until = now, time.monotonic() + idle
    return None


def _computed(child: int) -> float:
    """Seconds that a process computed, not counting what the system did for it, such as looking for memory."""
    fields = Path(f"/proc/{child}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")  # utime, of which the state is the first here
