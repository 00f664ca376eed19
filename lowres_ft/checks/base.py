"""What a check is: it looks at the rows of an experiment and tells what it found."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from lowres_ft.spec import Spec

if TYPE_CHECKING:
    from lowres_ft.checks._survey import Survey

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
"""An error makes a result wrong; a warning deserves a look before training; an info is good to know."""


class Finding(Spec):
    """Something that was found in some rows."""

    kind: str
    """What it is called, such as `leakage`."""
    severity: Severity
    split: str
    """The split that the rows are of: train, validation or test; `all` where they are of several."""
    count: int
    """Rows (of `balance` and `labels`, of a class; of `entities`, places) that it concerns."""
    of: int
    """Rows that were looked at."""
    sampled: bool = False
    """True where more rows stand there than were looked at."""
    rows: tuple[str, ...] = ()
    """File and line of the first of them."""
    message: str
    """What was found, and what it means."""
    hint: str
    """What to do about it."""


class Check(Spec):
    """A family of findings. Its fields are the limits from which it speaks."""

    kind: str
    """Name of the check's file."""
    costly: ClassVar[bool] = False
    """True where it takes seconds, so that a run looks at few rows only."""
    gravest: ClassVar[Severity] = "error"
    """The gravest that a finding of it may be. A run tells no infos, and leaves out what finds nothing graver."""

    def find(self, survey: "Survey") -> Iterator[Finding]:
        """What is worth telling of the rows, if there is anything."""
        raise NotImplementedError


PLUGIN = Check
