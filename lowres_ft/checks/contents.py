"""Columns that hardly hold texts: identifiers, numbers, one value again and again."""

import re
from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import Field

from lowres_ft.checks._survey import Part, Survey, groups, shown, texts
from lowres_ft.checks.base import Check, Finding

_ID = re.compile(
    r"[-+]?[\d.,:/ -]*\d"  # a number, a date
    r"|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{16,}"  # a UUID, a hash
    r"|https?://\S+|\S+@\S+\.\w+|(?:[A-Za-z]:)?[/\\]\S+"  # an address, a path
    r"|(?=\S*\d)(?=\S*[A-Za-z_#-])[\w#.-]+",  # a word with digits, such as user_123
    re.IGNORECASE,
)
_COLUMN = "Is this the text column? data.columns.text=NAME says which one it is."


class Contents(Check):
    """Columns that hardly hold texts: identifiers, numbers, one value again and again."""

    kind: Literal["contents"] = "contents"
    sample: int = Field(default=20_000, ge=1)
    """Rows of a split that are looked at, at the most."""
    ids: float = Field(default=0.3, gt=0, le=1)
    """Share of texts that are no more than an identifier or a number from which that is told."""
    constant: float = Field(default=0.5, gt=0, le=1)
    """Share of the rows with one and the same text from which that is told."""
    distinct: float = Field(default=0.05, gt=0, lt=1)
    """Share of different texts below which they are told as few."""
    rows: int = Field(default=50, ge=2)
    """Rows from which texts that repeat are told."""

    def find(self, survey: Survey) -> Iterator[Finding]:
        for part in survey.parts.values():
            yield from self._ids(survey, part)
            if len(part) >= self.rows:
                yield from self._same(part)

    def _ids(self, survey: Survey, part: Part) -> Iterator[Finding]:
        positions = part.sample(survey.most or self.sample)
        said = [" ".join(texts(example)).strip() for example in part.examples(positions)]
        like = np.array([row for row, text in enumerate(said) if _ID.fullmatch(text[:200])], dtype=np.int64)
        if len(like) >= self.ids * len(positions):
            message = f"texts are numbers, identifiers or addresses, such as {shown(said[like[0]])}"
            yield part.finding("id_texts", "warning", positions[like], message, _COLUMN, of=len(positions))

    def _same(self, part: Part) -> Iterator[Finding]:
        different = len(np.unique(part.keys))
        repeated = groups(part.keys)
        if repeated and len(repeated[0]) >= self.constant * len(part):
            said = next(" ".join(texts(example)) for example in part.examples(repeated[0][:1]))
            wrong = different == 1
            message = f"rows have one and the same text, {shown(said)}" + ": no answer can follow from it" * wrong
            yield part.finding("constant_text", "error" if wrong else "warning", repeated[0], message, _COLUMN)
        elif different < self.distinct * len(part):
            message = f"there are {different:,} different texts only"
            yield part.finding("few_texts", "warning", np.concatenate(repeated), message, _COLUMN)
