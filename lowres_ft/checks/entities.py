"""Entities that are marked now in one way, now in another."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import Field

from lowres_ft.checks._survey import Part, Survey
from lowres_ft.checks.base import Check, Finding
from lowres_ft.tasks import _tags
from lowres_ft.tasks._sentence import Sentence

_NAMED = 5  # entities that a message names


class Entities(Check):
    """Entities that are marked now in one way, now in another."""

    kind: Literal["entities"] = "entities"
    sample: int = Field(default=50_000, ge=1)
    """Rows of a split that are looked at, at the most."""
    times: int = Field(default=3, ge=2)
    """How often something is marked alike before it is told where it is not."""
    outvoted: float = Field(default=0.25, gt=0, lt=1)
    """Share of its places up to which another mark is told; above, it means both."""
    letters: int = Field(default=4, ge=1)
    """Letters of a word that is told where it is not marked."""
    bare: float = Field(default=0.9, gt=0, lt=1)
    """Share of rows without any entity from which that is told."""

    def find(self, survey: Survey) -> Iterator[Finding]:
        if survey.task.kind != "ner":
            return
        for part in survey.parts.values():
            positions = part.sample(survey.most or self.sample)
            examples = list(zip(positions.tolist(), part.examples(positions), strict=True))
            yield from self._types(part, examples)
            yield from self._unmarked(part, examples)
            bare = np.array([row for row, one in examples if not _tags.types_in(one.tags or ())], dtype=np.int64)
            if len(bare) >= self.bare * len(examples):
                message = "rows have no entity at all"
                hint = "Were all texts annotated? Those that were not teach that there is nothing to find."
                yield part.finding("no_entities", "warning", bare, message, hint, of=len(examples))

    def _types(self, part: Part, examples: list[tuple[int, Sentence]]) -> Iterator[Finding]:
        """The same words with different types."""
        places: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for row, example in examples:
            for words, label in _entities(example):
                places[words][label].append(row)
        found: list[tuple[int, str]] = []
        told: Counter[str] = Counter()
        for words, by_type in places.items():
            usual = max(by_type, key=lambda label: len(by_type[label]))
            others = sum(len(rows) for label, rows in by_type.items() if label != usual)
            if (
                others
                and len(by_type[usual]) >= self.times
                and others <= self.outvoted * (others + len(by_type[usual]))
            ):
                odd = [label for label in by_type if label != usual]
                found += [(row, words) for label in odd for row in by_type[label]]
                told[f"{words!r} is {usual} {len(by_type[usual])} times, {' or '.join(odd)} {others} times"] = others
        if found:
            message = f"places where words have another type than usual: {_first(told)}"
            hint = "Either the type follows from what stands around, or it is a slip: look at the rows."
            rows = np.array(list(dict.fromkeys(row for row, _ in found)))
            yield part.finding("conflicting_types", "info", rows, message, hint, of=len(examples))

    def _unmarked(self, part: Part, examples: list[tuple[int, Sentence]]) -> Iterator[Finding]:
        """Words that are entities by themselves nearly always, and are not marked now and then."""
        marked: Counter[str] = Counter()
        bare: dict[str, list[int]] = defaultdict(list)
        for row, example in examples:
            marked.update(words for words, _ in _entities(example) if " " not in words)
            for word, tag in zip(example.strings, example.tags or (), strict=False):
                if tag == _tags.OUTSIDE and len(word) >= self.letters:
                    bare[word.casefold()].append(row)
        found = {
            word: bare[word]
            for word, count in marked.items()
            if count >= self.times and 0 < len(bare[word]) <= self.outvoted * (count + len(bare[word]))
        }
        if found:
            told = Counter(
                {
                    f"{word!r} is marked {marked[word]} times, not {len(rows)} times": len(rows)
                    for word, rows in found.items()
                }
            )
            rows = np.array(list(dict.fromkeys(row for rows in found.values() for row in rows)))
            message = f"words that are entities elsewhere are not marked: {_first(told)}"
            hint = "If they were overlooked, mark them: each teaches that there is nothing to find."
            yield part.finding("unmarked_entities", "info", rows, message, hint, of=len(examples))


def _entities(example: Sentence) -> Iterator[tuple[str, str]]:
    """The words of each entity, without capitals, and its type."""
    words: list[str] = []
    label = ""
    for word, tag in zip(example.strings, [*_tags.to_bio(example.tags or ())], strict=False):
        if tag[0] != "I" and words:
            yield " ".join(words), label
            words = []
        if tag != _tags.OUTSIDE:
            words, label = [*words, word.casefold()], tag[2:]
    if words:
        yield " ".join(words), label


def _first(told: Counter[str]) -> str:
    names = [name for name, _ in told.most_common(_NAMED)]
    return "; ".join(names) + (f"; and {len(told) - _NAMED} more" if len(told) > _NAMED else "")
