"""The words of a text, and entities as spans of its characters.

The words of a text that comes unsplit are: a web address; a run of letters, digits and underscores, with a @ or # that
stands before it; a character of a script that sets no spaces; any other sign, with its repetitions. Combining marks and
joiners belong to what they follow.
"""

import functools
import itertools
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowres_ft.errors import DataError
from lowres_ft.spec import shown
from lowres_ft.tasks._tags import OUTSIDE

# Thai and Lao; Myanmar; Khmer; kana; Chinese characters.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_JOINERS = "\u00ad\u200c\u200d"
_LAST_MARK = 0x1F000  # marks of scripts; beyond are signs, and selectors that no text of words has


@functools.cache
def _word() -> re.Pattern[str]:
    """What a word is; Python's `re` knows no class of marks."""
    marks = "".join(filter(lambda mark: unicodedata.category(mark)[0] == "M", map(chr, range(0x300, _LAST_MARK))))
    after = f"[{marks}{_JOINERS}]*"
    return re.compile(
        r"(?:https?://|www\.)[!-~]*[A-Za-z0-9/]"
        rf"|[{_UNSPACED}]{after}|[@#]?(?:[^\W{_UNSPACED}]{after})+|([^\w\s])\1*{after}"
    )


def split(text: str, borders: Collection[int] = ()) -> list[list[int]]:
    """[start, end) of the words of a text; a word with one of the `borders` inside is cut there."""
    cuts = sorted(set(borders))
    found = []
    for match in _word().finditer(text):
        inner = cuts[bisect_right(cuts, match.start()) : bisect_left(cuts, match.end())]
        found += [list(pair) for pair in itertools.pairwise((match.start(), *inner, match.end()))]
    return found


@dataclass(frozen=True, order=True)
class Span:
    """An entity in a text: its first character, the one after its last, and its type."""

    start: int
    end: int
    label: str
    trimmed: bool = False
    """True where it was given with white space at its ends, which is part of no word."""

    def __str__(self) -> str:
        return f"{self.label} {self.start}-{self.end}"


def spans(values: object, text: str, where: str) -> list[Span]:
    """The entities of a row, in their order in the text.

    Raises:
        DataError: One of them is none, is not in the text, or overlaps another.
    """
    if not isinstance(values, list | tuple):
        raise DataError(f"{where}: the entities are {shown(values)}, not a list", hint=_FORM)
    found = sorted(_span(value, f"{where}: entity {number}", text) for number, value in enumerate(values, start=1))
    for first, second in itertools.pairwise(found):
        if second.start < first.end:
            raise DataError(
                f"{where}: the entities {first} and {second} overlap",
                hint="A word can have one tag only: keep the outer or the inner ones.",
            )
    return found


_FORM = (
    'Entities are a list such as [{"start": 0, "end": 5, "label": "PER"}] or [[0, 5, "PER"]], counted in characters.'
)


def _span(value: object, place: str, text: str) -> Span:
    """An entity, or a DataError that says at which `place` what is wrong."""
    start, end, label = _parts(value, place)
    for name, number in (("start", start), ("end", end)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise DataError(f"{place}: {name} is {shown(number)}, which is not a whole number", hint=_FORM)
    if not isinstance(label, str) or not label.strip():
        raise DataError(f"{place}: the label is {shown(label)}, which names no type", hint=_FORM)
    if start >= end:
        raise DataError(f"{place}: it starts at {start} and ends at {end}", hint="The end is the place after the last.")
    if start < 0 or end > len(text):
        raise DataError(
            f"{place}: {start}-{end} leaves the text, which has {len(text)} characters",
            hint="Places are counted in characters from 0, not in bytes.",
        )
    found = text[start:end]
    if not found.strip():
        raise DataError(f"{place}: {start}-{end} holds white space alone", hint="Mend or remove it.")
    inner = end - len(found.lstrip()), start + len(found.rstrip())
    return Span(*inner, label, trimmed=inner != (start, end))


def _parts(value: object, place: str) -> tuple[Any, Any, Any]:
    if isinstance(value, Mapping):
        if lacking := [name for name in ("start", "end", "label") if name not in value]:
            raise DataError(f"{place}: {shown(value)} has no {' and no '.join(lacking)}", hint=_FORM)
        return value["start"], value["end"], value["label"]
    if isinstance(value, list | tuple) and len(value) == 3:
        start, end, label = value
        return start, end, label
    raise DataError(f"{place}: {shown(value)} is no entity", hint=_FORM)


def tagged(words: Sequence[Sequence[int]], found: Sequence[Span]) -> list[str]:
    """Tags in BIO of words at whose borders all the spans begin and end."""
    tags = [OUTSIDE] * len(words)
    starts = [start for start, _ in words]
    for span in found:
        first, last = bisect_left(starts, span.start), bisect_left(starts, span.end)
        tags[first:last] = [f"B-{span.label}", *[f"I-{span.label}"] * (last - first - 1)]
    return tags
