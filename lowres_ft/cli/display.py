"""What a run looks like: a rich progress bar on a terminal, plain lines elsewhere. All of it goes to stderr."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lowres_ft import spec
from lowres_ft.events import Evaluated, Event, Fetching, Listener, Note, Stage, Trained, unheard
from lowres_ft.harmless import harmless
from lowres_ft.sizes import show_seconds

_LINE_EVERY = 10.0  # seconds between plain lines
_SMOOTH = 0.9  # of the loss that is shown


class Display:
    """A listener for `run` that shows events; use it as a context manager."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task: TaskID | None = None
        self.shown = 0.0
        self.loss: float | None = None
        self.tokens = 0
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case Stage(text):
                self._end()
                self.console.print(escape(f"{harmless(text)} ..."))
            case Note(text):
                self.console.print(escape(f"note: {harmless(text)}"))
            case Fetching(what, done, total):
                self._advance(f"fetching {what}", done, total, f"{done / 1e6:.0f} of {total / 1e6:.0f} MB")
            case Trained(step, total, left):
                self.loss = step.loss if self.loss is None else _SMOOTH * self.loss + (1 - _SMOOTH) * step.loss
                self.tokens += step.tokens
                self.seconds += step.seconds
                figures = f"loss {self.loss:.3f}  {self.tokens / self.seconds:,.0f} tokens/s"
                self._advance("training", step.number, total, figures, f"  {show_seconds(left)} left")
            case Evaluated(number, name, value):
                self.console.print(f"step {number}: validation {name} {spec.figures(value)[0]}")

    def _advance(self, what: str, done: int, total: int, figures: str, left: str = "") -> None:
        """Move the bar; without a terminal, print a line now and then and at the end."""
        if self.task is None:
            self.task = self.progress.add_task(what, total=total, figures=figures)
        self.progress.update(self.task, description=what, completed=done, total=total, figures=figures)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self.shown >= _LINE_EVERY or done == total):
            self.shown = now
            counted = "" if left == "" else f"step {done} of {total}  "
            self.console.print(f"{what}: {counted}{figures}{left}", soft_wrap=True)

    def _end(self) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
            self.task = None


@contextmanager
def listening(quiet: bool) -> Iterator[Listener]:
    """A display, or a listener that shows nothing."""
    if quiet:
        yield unheard
    else:
        with Display() as display:
            yield display
