"""Standard output and error, on which nothing acts that came from files, and which may be full or gone.

What cannot be written to standard output is an error in a sentence. What cannot be told on standard error is not told:
a run goes on when its terminal has gone.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TextIO

from lowres_ft.errors import OutputError
from lowres_ft.harmless import harmless


class _Sure:
    """A text stream whose disk may be full and whose terminal may be gone."""

    def __init__(self, stream: TextIO, *, matters: bool) -> None:
        self.stream, self.matters = stream, matters

    def write(self, text: str) -> int:
        if text:  # typer tries a stream with none, and would not tell what came of it
            self._do(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._do(self.stream.flush)

    def _do(self, work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as error:
            if self.matters and isinstance(error, BrokenPipeError):  # the reader has enough, which typer knows of
                raise
            nowhere(self.stream)
            if self.matters:
                why = error.strerror or str(error)
                hint = "Make room, or let it be written elsewhere."
                raise OutputError(f"standard output cannot be written: {why}", hint=hint) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _Guarded:
    """A text stream that writes marks which are not printed, or not of its encoding, as escapes."""

    def __init__(self, stream: _Sure) -> None:
        self.rich_proxied_file = stream  # rich, which moves the cursor itself, writes to this one

    def write(self, text: str) -> int:
        stream = self.rich_proxied_file
        encoding = stream.encoding or "utf-8"
        begin = "\r" * text.startswith("\r")  # progress bars of other libraries
        told = begin + harmless(text.removeprefix(begin))
        stream.write(told.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextmanager
def guarded() -> Iterator[None]:
    """Let `print` and all else that writes text, but for rich, write what is harmless."""
    before = sys.stdin, sys.stdout, sys.stderr
    with ExitStack() as closing:
        if None in before:
            _take_low_numbers()
            null = closing.enter_context(open(os.devnull, "r+", encoding="utf-8"))
        given, out, err = (null if stream is None else stream for stream in before)
        sys.stdin, sys.stdout, sys.stderr = (
            given,
            _Guarded(_Sure(out, matters=True)),
            _Guarded(_Sure(err, matters=False)),
        )
        try:
            yield
        finally:
            sys.stdin, sys.stdout, sys.stderr = before


def finish() -> None:
    """Write what standard output still holds: as Python ends it would fail without a sentence.

    Raises:
        OutputError: There is no room for it.
        SystemExit: Nobody reads it.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        nowhere(sys.stdout)
        sys.exit(1)


def nowhere(stream: TextIO) -> None:
    """Let what a stream still holds, and all that follows, go nowhere."""
    with suppress(OSError, ValueError):  # it is no file of the system's
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _take_low_numbers() -> None:
    """Keep files that are opened later from the numbers of streams that were closed, to which others may write."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
