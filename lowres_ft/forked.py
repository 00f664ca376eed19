"""A call in a process of its own, so that the libraries and the memory that it needs are gone when it has ended.

The child is forked and has what this process has, but none of its threads. So it is for calls that compute with
neither PyTorch nor tokenizers, whose pools of threads may have begun.
"""

import ctypes
import json
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl
_MOST = 30.0  # seconds; a child that takes longer is taken to hang
_CHUNK = 2**16


def result(call: Callable[[], Any], most: float = _MOST) -> Any:
    """What a call gives, values of JSON, from a child; this process calls it where no child could.

    That is so off Linux, and where the child fails, dies or takes more than `most` seconds: what it would raise is then
    raised here.
    """
    found = _of_child(call, most) if sys.platform == "linux" else None
    return call() if found is None else found[0]


def _of_child(call: Callable[[], Any], most: float) -> tuple[Any] | None:
    """What the call gives in a child; None where that fails."""
    ours, theirs = os.pipe()
    parent = os.getpid()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child has none of
            child = os.fork()
    except OSError:  # no room for a process
        os.close(ours)
        os.close(theirs)
        return None
    if child == 0:
        _work(call, theirs, parent)
    os.close(theirs)
    answer = None
    try:
        answer = _read(ours, most)
    finally:
        os.close(ours)
        if answer is None:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return (json.loads(answer),) if answer and not status else None


def _work(call: Callable[[], Any], to: int, parent: int) -> None:
    """Call, write what it gives, and end without what a process does at its end: that is the parent's to do."""
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        # With its parent it ends, whose locks it has too.
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() == parent:
            with os.fdopen(to, "wb") as file:
                file.write(json.dumps(call()).encode())
            code = 0
    except BaseException:  # noqa: BLE001, S110 (the parent calls, and tells what is raised)
        pass
    finally:
        os._exit(code)


def _read(source: int, most: float) -> bytes | None:
    """All that the child writes until it ends; None where it takes too long."""
    found, until = bytearray(), time.monotonic() + most
    while select.select([source], [], [], max(0.0, until - time.monotonic()))[0]:
        if not (chunk := os.read(source, _CHUNK)):
            return bytes(found)
        found += chunk
    return None
