"""Errors that a user can act on. `main()` catches `LowresError` alone; anything else is a bug.

LowresError
├── RecipeError      a recipe or an override is wrong
├── AssetError       a starter asset or a Hub file cannot be had, or is not what it should be
├── DataError        a data file or one of its rows is wrong
├── ModelError       a base cannot be loaded, adapted or quantized as asked
├── TrainingError    training cannot go on
├── OutOfMemoryError memory runs out, even for one example
├── BundleError      a bundle is broken, or does not belong to this base
└── OutputError      a result cannot be written where it was asked for
"""

from collections.abc import Iterable
from difflib import get_close_matches


class LowresError(Exception):
    """What was found and where (`message`), and what to do about it (`hint`)."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RecipeError(LowresError):
    """A recipe or an override is wrong; the message lists every problem."""


class AssetError(LowresError):
    """A starter asset or a Hub file cannot be had, or is not what it should be."""


class DataError(LowresError):
    """A data file or one of its rows is wrong; the message names file and line."""


class ModelError(LowresError):
    """A base cannot be loaded, adapted or quantized as asked."""


class TrainingError(LowresError):
    """Training cannot go on; the message names step, rate and rows."""


class OutOfMemoryError(LowresError):
    """Memory runs out where nothing smaller can be tried; the hint lists changes of the recipe that need less."""


class BundleError(LowresError):
    """A bundle is broken, or does not belong to the base at hand."""


class OutputError(LowresError):
    """A result cannot be written where it was asked for."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the known name closest to `name`, else an empty string."""
    spelled = {candidate.casefold(): candidate for candidate in known}
    matches = get_close_matches(name.strip().casefold(), spelled, n=1, cutoff=0.6)
    return f" (did you mean '{spelled[matches[0]]}'?)" if matches else ""


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line; its kind where it says nothing, or a key alone."""
    lines = str(error).strip().splitlines()
    kind = type(error).__name__
    return kind if not lines else f"{kind}: {lines[0]}" if isinstance(error, KeyError) else lines[0]
