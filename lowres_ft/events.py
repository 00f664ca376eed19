"""What happens in a run, for whoever shows it. The library never prints."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowres_ft.train import Step


@dataclass(frozen=True)
class Stage:
    """What begins now, in words."""

    text: str


@dataclass(frozen=True)
class Note:
    """Something that the user should know."""

    text: str


@dataclass(frozen=True)
class Fetching:
    """A download goes on; sizes in bytes."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class Trained:
    """A step is done, of `total`."""

    step: "Step"
    total: int
    left: float
    """Seconds to the end of training, as far as is known."""


@dataclass(frozen=True)
class Evaluated:
    """The validation metric after a step."""

    step: int
    name: str
    value: float


Event = Stage | Note | Fetching | Trained | Evaluated
Listener = Callable[[Event], None]


def unheard(event: Event) -> None:
    """A listener that shows nothing."""
