"""Labels that are hardly meant to be different ones."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import Literal

import numpy as np
from pydantic import Field

from lowres_ft.checks._survey import Survey
from lowres_ft.checks.base import Check, Finding

_DIGITS = re.compile(r"\d+")
_SIGNS = re.compile(r"[\W_]+")
_SHORTEST = 4  # letters of a label that may be misspelled


class Labels(Check):
    """Labels that are hardly meant to be different ones."""

    kind: Literal["labels"] = "labels"
    alike: float = Field(default=0.85, gt=0, le=1)
    """Share of equal characters (difflib's ratio) from which two labels may be one."""
    rarer: float = Field(default=0.2, gt=0, le=1)
    """Rows of the rarer one over those of the other, at the most: two that are as frequent are two classes."""

    def find(self, survey: Survey) -> Iterator[Finding]:
        train = survey.train
        counts = Counter(label for labels in train.rows.labels for label in labels)
        for (rare, few), (usual, many) in itertools.combinations(sorted(counts.items(), key=lambda kv: kv[1]), 2):
            if few > self.rarer * many or not self._alike(rare, usual):
                continue
            rows = np.array([row for row, own in enumerate(train.rows.labels) if rare in own], dtype=np.int64)
            message = f"the label {rare!r} ({few} rows) may be {usual!r} ({many} rows), written otherwise"
            yield train.finding("similar_labels", "warning", rows, message, "Write them alike, if they are one.")

    def _alike(self, one: str, other: str) -> bool:
        """Whether two labels differ in writing alone, or by a slip; numbers in them tell classes apart."""
        if _DIGITS.findall(one) != _DIGITS.findall(other):
            return False
        bare, opposite = (_SIGNS.sub("", label.casefold()) for label in (one, other))
        if bare == opposite:
            return bool(bare)
        if min(len(bare), len(opposite)) < _SHORTEST:
            return False
        return SequenceMatcher(None, bare, opposite).ratio() >= self.alike
