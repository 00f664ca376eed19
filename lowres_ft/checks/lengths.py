"""What `task.max_length` cuts off, and texts of a length that is hardly meant."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import numpy as np
from pydantic import Field

from lowres_ft.checks._survey import Part, Survey
from lowres_ft.checks.base import Check, Finding
from lowres_ft.tasks.base import Encoded, supervised

_AT_ONCE = 1024  # texts that pass the tokenizer together, as in a run, so that errors are told in the same words
_NO_LIMIT = 1 << 30  # tokens


@dataclass
class _Cut:
    """What was lost of some rows."""

    rows: list[int] = field(default_factory=list)
    """Positions of the rows that are longer than the limit."""
    left_out: list[int] = field(default_factory=list)
    tokens: int = 0
    lost_tokens: int = 0
    items: int = 0
    lost_items: int = 0
    longest: int = 0


class Lengths(Check):
    """What `task.max_length` cuts off, and texts of a length that is hardly meant."""

    kind: Literal["lengths"] = "lengths"
    sample: int = Field(default=50_000, ge=1)
    """Rows of a split that are tokenized, at the most."""
    warn_from: float = Field(default=0.05, gt=0, le=1)
    """Share of a split's rows from which cutting them is a warning; below, it is an info."""
    far: float = Field(default=20.0, gt=1)
    """A text is very long (or short) that has so many times more (or less) characters than the median one."""
    equal: float = Field(default=0.05, gt=0, le=1)
    """Share of the rows that have exactly the length of the longest one from which they look cut off."""
    shortest: int = Field(default=20, ge=1)
    """Characters of the longest text below which equal lengths say nothing."""

    def find(self, survey: Survey) -> Iterator[Finding]:
        for part in survey.parts.values():
            if survey.tokenizer is not None:
                yield from self._cut(survey, part)
            yield from self._outliers(part)
            yield from self._equal(part)

    def _cut(self, survey: Survey, part: Part) -> Iterator[Finding]:
        positions = part.sample(survey.most or self.sample)
        found = _measured(survey, part, positions)
        looked, limit = len(positions), survey.task.max_length
        if found.left_out:
            rows = np.array(found.left_out)
            message = f"rows are left out of training: task.max_length={limit} cuts all their answers off"
            yield part.finding("left_out", "warning", rows, message, "Raise it, or shorten them.", of=looked)
        if not found.rows:
            return
        rows = np.array(found.rows)
        longest = f"the longest has {found.longest:,} tokens"
        if not found.lost_tokens:
            message = f"texts are longer than task.max_length={limit} and are read in several windows; {longest}"
            yield part.finding("windows", "info", rows, message, "Nothing is lost by that.", of=looked)
            return
        share = f"{found.lost_tokens / found.tokens:.1%} of all tokens"
        if found.lost_items:
            share += f" and {found.lost_items / found.items:.1%} of what is to be learned"
        severity: Literal["warning", "info"] = "warning" if len(rows) >= self.warn_from * looked else "info"
        kind = "cut_answers" if found.lost_items else "cut_texts"
        message = f"texts are cut at task.max_length={limit}, which loses {share}; {longest}"
        hint = "Raise task.max_length (memory grows with it), or see that what matters stands at the beginning."
        yield part.finding(kind, severity, rows, message, hint, of=looked)

    def _outliers(self, part: Part) -> Iterator[Finding]:
        median = float(np.median(part.characters))
        long = np.flatnonzero(part.characters > self.far * median)
        short = np.flatnonzero(part.characters < median / self.far)
        for kind, rows, word in (("long_texts", long, "more"), ("short_texts", short, "less")):
            if 0 < len(rows) < 0.05 * len(part):
                ranked = rows[np.argsort(part.characters[rows], kind="stable")][:: -1 if word == "more" else 1]
                extreme = int(part.characters[ranked[0]])
                message = (
                    f"texts have {self.far:g} times {word} than the {median:.0f} characters that are usual: {extreme:,}"
                )
                hint = "Look at them: several rows run together, or a text that was cut off?"
                yield part.finding(kind, "info", ranked, message, hint, ranked=True)

    def _equal(self, part: Part) -> Iterator[Finding]:
        longest = int(part.characters.max())
        rows = np.flatnonzero(part.characters == longest)
        if longest < self.shortest or len(rows) < max(5.0, self.equal * len(part)):
            return
        if len(np.unique(part.keys[rows])) < len(rows) / 2:  # one text again and again
            return
        message = f"texts have exactly {longest:,} characters, and none has more: an export may have cut them off"
        yield part.finding("same_length", "warning", rows, message, "Export them again, whole.")


def _measured(survey: Survey, part: Part, positions: np.ndarray) -> _Cut:
    """Tokenize rows without a limit, and those that are longer than it once more as a run does.

    Raises:
        DataError: What a run would raise, in the same words.
    """
    found = _Cut()
    whole = survey.task.model_copy(update={"max_length": _NO_LIMIT})
    pairs = zip(positions.tolist(), part.examples(positions), strict=True)
    while several := list(islice(pairs, _AT_ONCE)):
        places, examples = zip(*several, strict=True)
        encoded = whole.encode(survey.tokenizer, examples)
        sizes = [sum(len(one.ids) for one in row) for row in encoded]
        long = [at for at, size in enumerate(sizes) if size > survey.task.max_length]
        again = survey.task.encode(survey.tokenizer, [examples[at] for at in long]) if long else []
        found.tokens += sum(sizes)
        found.items += sum(map(_items, encoded))
        for at, row in zip(long, again, strict=True):
            _add(found, places[at], encoded[at], row)
    return found


def _add(found: _Cut, position: int, whole: Sequence[Encoded], cut: Sequence[Encoded]) -> None:
    size = sum(len(one.ids) for one in whole)
    found.longest = max(found.longest, size)
    found.lost_items += _items(whole) - _items(cut)
    found.lost_tokens += max(0, size - sum(len(one.ids) for one in cut))
    (found.rows if cut else found.left_out).append(position)


def _items(row: Sequence[Encoded]) -> int:
    """What of a row is learned."""
    return sum(int(supervised(np.array(one.targets)).sum()) for one in row)
