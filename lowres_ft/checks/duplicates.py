"""Rows that stand there more than once: equal but for capitals and white space."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import Field

from lowres_ft.checks._survey import ALL, Part, Survey, groups, shown, texts
from lowres_ft.checks.base import Check, Finding

_TOLD = 10  # rows that are named at the most


class Duplicates(Check):
    """Rows that stand there more than once: equal but for capitals and white space."""

    kind: Literal["duplicates"] = "duplicates"
    warn_from: float = Field(default=0.05, gt=0, le=1)
    """Share of a split's rows from which repetitions in it are a warning; below, they are an info."""
    wrong_from: float = Field(default=0.5, gt=0, le=1)
    """Share of a held-out split that stands in train from which scores on it are wrong, and the check an error."""

    def find(self, survey: Survey) -> Iterator[Finding]:
        for part in survey.parts.values():
            yield from self._repeated(part)
        yield from _conflicting(survey)
        for number, part in enumerate(survey.held):
            for other in (survey.train, *survey.held[:number]):
                yield from self._leaked(part, other)

    def _repeated(self, part: Part) -> Iterator[Finding]:
        found = groups(part.keys)
        extra = sum(len(rows) - 1 for rows in found)
        if not extra:
            return
        severity: Literal["warning", "info"] = "warning" if extra >= self.warn_from * len(part) else "info"
        repeated = np.concatenate([part.first(rows)[1:] for rows in found])
        said = next(" ".join(texts(example)) for example in part.examples(found[0][:1]))
        message = f"rows repeat another one; the most frequent stands there {len(found[0]):,} times: {shown(said)}"
        hint = "They count that often in training and in scores; data.distinct=true keeps equal rows once."
        yield part.finding("duplicates", severity, repeated, message, hint)

    def _leaked(self, part: Part, other: Part) -> Iterator[Finding]:
        rows = np.flatnonzero(np.isin(part.keys, other.keys))
        if not len(rows):
            return
        wrong = len(rows) >= self.wrong_from * len(part)
        said = next(" ".join(texts(example)) for example in part.examples(part.first(rows)[:1]))
        message = f"rows of {part.name} stand in {other.name} too, but for capitals and white space: {shown(said)}"
        hint = f"What was learned by heart is scored there: remove them from {other.name} or from {part.name}."
        yield part.finding("leakage", "error" if wrong else "warning", rows, message, hint)


def _conflicting(survey: Survey) -> Iterator[Finding]:
    """Equal texts with different answers, wherever they stand."""
    parts = list(survey.parts.values())
    keys, answers = (np.concatenate([getattr(part, name) for part in parts]) for name in ("keys", "answers"))
    owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    starts = np.cumsum([0, *map(len, parts)])
    found = [rows for rows in groups(keys) if (answers[rows] != answers[rows[0]]).any()]
    if not found:
        return
    rows = np.concatenate(found)
    named = [parts[owner[row]].where([row - starts[owner[row]]])[0] for row in rows[:_TOLD]]
    first = parts[owner[rows[0]]]
    said = next(" ".join(texts(example)) for example in first.examples(rows[:1] - starts[owner[rows[0]]]))
    yield Finding(
        kind="conflicting_duplicates",
        severity="warning",
        split=first.name if len(set(owner[rows])) == 1 else ALL,
        count=len(rows),
        of=len(keys),
        rows=tuple(named),
        message=f"rows have equal texts but different answers, such as {shown(said)}",
        hint="At most one answer to a text can be right: decide, or remove the rows.",
    )
