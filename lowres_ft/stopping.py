"""Signals that ask to stop: at once, or, within `deferred`, where nothing is half done.

The command line installs the handlers. SIGINT and SIGTERM unwind everything as `Stopped`; a second one ends the process
where it stands, which must be harmless.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_TWICE = 0.5  # seconds in which a launcher passes on a signal that the terminal sent to its processes already


class Stopped(SystemExit):
    """A signal came; the exit code is 128 and its number."""


class _Signals:
    """The first signal that came, and whether it has to wait."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.came = 0.0
        self.deferred = 0

    def forget(self) -> None:
        """Begin anew: none came."""
        self.number, self.deferred = None, 0

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.number is None:
            self.number, self.came = number, time.monotonic()
            self.take()
        elif "WORLD_SIZE" not in os.environ or time.monotonic() - self.came > _TWICE:
            os._exit(128 + number)

    def take(self) -> None:
        """Stop if a signal came and may take effect."""
        if self.number is not None and not self.deferred:
            raise Stopped(128 + self.number)


_signals = _Signals()


def install() -> None:
    """Let SIGINT and SIGTERM be heard from now on."""
    _signals.forget()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _signals.hear)


@contextmanager
def deferred() -> Iterator[None]:
    """What is inside is done to its end, or up to a `check`, before a signal takes effect."""
    _signals.deferred += 1
    try:
        yield
    except RuntimeError as error:
        if _signals.number is not None:  # another process of this run was asked too, and no longer answers
            raise Stopped(128 + _signals.number) from error
        raise
    finally:
        _signals.deferred -= 1
    _signals.take()


def check() -> None:
    """Stop here if a signal came; for places within `deferred` where nothing is half done.

    Raises:
        Stopped: One came.
    """
    if _signals.number is not None:
        raise Stopped(128 + _signals.number)
