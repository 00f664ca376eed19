"""Rows that are nearly the same: MinHash finds candidates, and the share of common shingles decides."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from lowres_ft.checks._survey import Part, Survey, normal, shown, texts
from lowres_ft.checks.base import Check, Finding

_PERMUTATIONS = 128
_BANDS = 16  # of 8: finds a pair of similarity 0.8 with a probability of 0.95 (1 - (1 - s^8)^16)
_SEED = 42
_CHARACTERS = 2000  # of a text that are compared
_SHORTEST = 20  # characters of a text that is compared
_CANDIDATES = 20  # that are compared with a row, so that rows of one form do not take for ever
_AT_ONCE = 1000


class _Row(NamedTuple):
    """A text of the sample, and where it stands."""

    part: Part
    position: int
    text: str


class Similar(Check):
    """Rows that are nearly, but not quite, the same."""

    kind: Literal["similar"] = "similar"
    jaccard: float = Field(default=0.8, gt=0, lt=1)
    """Share of common shingles (5 characters) from which two texts are nearly the same."""
    sample: int = Field(default=50_000, ge=1)
    """Rows of a split that are looked at, at the most."""
    warn_from: float = Field(default=0.05, gt=0, le=1)
    """Share of a split's rows from which such rows in it are a warning; below, they are an info."""
    costly = True

    def find(self, survey: Survey) -> Iterator[Finding]:
        samples = {name: part.sample(survey.most or self.sample) for name, part in survey.parts.items()}
        rows = list(_distinct(survey.parts.values(), samples))
        pairs = list(self._pairs(rows))
        for name, part in survey.parts.items():
            inside = [(rows[a], rows[b]) for a, b in pairs if rows[a].part is part and rows[b].part is part]
            yield from self._near(part, inside, len(samples[name]))
        for part in survey.held:
            across = [(rows[a], rows[b]) for a, b in pairs if rows[a].part is survey.train and rows[b].part is part]
            yield from _leaked(survey, part, across, len(samples[part.name]))

    def _pairs(self, rows: Sequence[_Row]) -> Iterator[tuple[int, int]]:
        """Rows whose shingles are nearly the same, each with an earlier one."""
        from rensa import RMinHash, RMinHashLSH

        index = RMinHashLSH(self.jaccard, _PERMUTATIONS, _BANDS)
        for start in range(0, len(rows), _AT_ONCE):
            sets = [_shingles(row.text) for row in rows[start : start + _AT_ONCE]]
            for place, sketch in enumerate(RMinHash.from_token_sets(sets, _PERMUTATIONS, _SEED), start=start):
                candidates = sorted(index.query(sketch))[:_CANDIDATES]
                own = set(sets[place - start])
                for other in candidates:
                    if _jaccard(own, set(_shingles(rows[other].text))) >= self.jaccard:
                        yield other, place
                index.insert(place, sketch)

    def _near(self, part: Part, pairs: Sequence[tuple[_Row, _Row]], looked: int) -> Iterator[Finding]:
        rows = np.array(list(dict.fromkeys(later.position for _, later in pairs)), dtype=np.int64)
        if not len(rows):
            return
        first, second = pairs[0]
        severity: Literal["warning", "info"] = "warning" if len(rows) >= self.warn_from * looked else "info"
        message = f"rows are nearly the same as another one, such as {shown(first.text)} and {shown(second.text)}"
        hint = "Such rows teach little; where they differ in names and numbers alone, keep one of each form."
        yield part.finding("near_duplicates", severity, rows, message, hint, of=looked)


def _leaked(survey: Survey, part: Part, pairs: Sequence[tuple[_Row, _Row]], looked: int) -> Iterator[Finding]:
    rows = np.array(list(dict.fromkeys(held.position for _, held in pairs)), dtype=np.int64)
    if not len(rows):
        return
    trained, held = pairs[0]
    where = f"{survey.train.where([trained.position])[0]} and {part.where([held.position])[0]}"
    message = f"rows of {part.name} are nearly the same as one of train, such as {where}: {shown(held.text)}"
    hint = f"They are easier than new texts are: remove them from {part.name}, or keep all of a kind on one side."
    yield part.finding("near_leakage", "warning", rows, message, hint, of=looked)


def _distinct(parts: Iterable[Part], samples: dict[str, np.ndarray]) -> Iterator[_Row]:
    """The sampled texts, train first, each once: equal ones are another finding."""
    seen: set[int] = set()
    for part in parts:
        positions = samples[part.name]
        for position, example in zip(positions.tolist(), part.examples(positions), strict=True):
            key = int(part.keys[position])
            text = normal(" ".join(texts(example)))[:_CHARACTERS]
            if key not in seen and len(text) >= _SHORTEST:
                seen.add(key)
                yield _Row(part, position, text)


def _shingles(text: str) -> list[str]:
    return [text[at : at + 5] for at in range(len(text) - 4)]


def _jaccard(one: set[str], other: set[str]) -> float:
    both = len(one & other)
    return both / (len(one) + len(other) - both)
