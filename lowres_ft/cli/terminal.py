"""Standard output and error on which nothing acts that came from files, whoever prints it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from lowres_ft.harmless import harmless


class _Guarded:
    """A text stream that writes marks which are not printed, or not of its encoding, as escapes."""

    def __init__(self, stream: TextIO) -> None:
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
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Guarded(sys.stdout), _Guarded(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
