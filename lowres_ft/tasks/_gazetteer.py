"""Entities known by heart: the baseline that a tagger must beat to have learned more than a list of names."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from lowres_ft.tasks._tags import OUTSIDE, to_bio

Phrase = tuple[str, ...]


@dataclass(frozen=True)
class Gazetteer:
    """The type of each phrase that is an entity more often than not."""

    types: Mapping[Phrase, str]

    @classmethod
    def of(cls, sentences: Sequence[tuple[Sequence[str], Sequence[str]]]) -> Self:
        """Learn, from words and tags, a phrase of which more than half of the occurrences are entities of a type."""
        tagged: defaultdict[Phrase, Counter[str]] = defaultdict(Counter)
        for words, tags in sentences:
            for start, end, kind in _entities(tags):
                tagged[_phrase(words[start:end])][kind] += 1
        occurrences: Counter[Phrase] = Counter()
        lengths = {len(phrase) for phrase in tagged}
        for words, _ in sentences:
            whole = _phrase(words)
            for length in lengths:
                grams = (whole[start : start + length] for start in range(len(whole) - length + 1))
                occurrences.update(gram for gram in grams if gram in tagged)
        best = {phrase: kinds.most_common(1)[0] for phrase, kinds in tagged.items()}
        return cls({phrase: kind for phrase, (kind, count) in best.items() if 2 * count > occurrences[phrase]})

    def tags(self, words: Sequence[str]) -> list[str]:
        """Tags in BIO of the longest known phrases, from left to right."""
        whole, found, start = _phrase(words), [OUTSIDE] * len(words), 0
        lengths = sorted({len(phrase) for phrase in self.types}, reverse=True)
        while start < len(whole):
            length = next((n for n in lengths if n <= len(whole) - start and whole[start : start + n] in self.types), 0)
            if length:
                kind = self.types[whole[start : start + length]]
                found[start : start + length] = [f"B-{kind}", *[f"I-{kind}"] * (length - 1)]
            start += max(1, length)
        return found


def _phrase(words: Sequence[str]) -> Phrase:
    """Without capitals: that finds more, and is seldom wrong."""
    return tuple(word.casefold() for word in words)


def _entities(tags: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """First word, the one after the last, and type of each entity."""
    bio = to_bio(tags)
    for start, tag in enumerate(bio):
        if tag[0] == "B":
            end = start + 1
            while end < len(bio) and bio[end][0] == "I":
                end += 1
            yield start, end, tag[2:]
