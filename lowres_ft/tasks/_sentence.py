"""A text whose words have tags, and how rows are read as one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowres_ft.errors import DataError
from lowres_ft.spec import shown
from lowres_ft.tasks import _words
from lowres_ft.tasks._tags import is_tag
from lowres_ft.tasks.base import Example

_SCHEMES = "Tags are O, or B-, I-, E-, S-, L- or U- before a type, as in B-PER (IOB1, BIO, BIOES or BILOU)."


@dataclass(frozen=True, slots=True)
class Sentence(Example):
    """A text, its words, and their tags as the row has them; None where they are to be predicted."""

    text: str
    words: list[list[int]]
    """[start, end) of each word in the text."""
    tags: list[str] | None = None
    trimmed: int = 0
    """Entities that had white space at their ends."""

    def word(self, place: int) -> str:
        """A word as messages name it."""
        start, end = self.words[place]
        return f"word {place + 1} {shown(self.text[start:end])}"

    @property
    def strings(self) -> list[str]:
        """The words themselves."""
        return [self.text[start:end] for start, end in self.words]


def from_words(row: Mapping[str, Any], where: str) -> Sentence:
    """A sentence of a row with a list of words and one of tags; its text has single spaces between the words.

    Raises:
        DataError: A word or a tag is none, or their numbers differ.
    """
    words = _strings(row["words"], where)
    starts = [0]
    for word in words:
        starts.append(starts[-1] + len(word) + 1)
    spans = [[start, start + len(word)] for start, word in zip(starts, words, strict=False)]
    sentence = Sentence(where, " ".join(words), spans)
    if "tags" not in row:
        return sentence
    tags = row["tags"]
    if not isinstance(tags, list | tuple):
        raise DataError(f"{where}: the tags are {shown(tags)}, not a list", hint=_SCHEMES)
    if len(tags) != len(words):
        raise DataError(f"{where}: {len(words)} words but {len(tags)} tags", hint="Each word has one tag.")
    for place, tag in enumerate(tags):
        if not is_tag(tag):
            raise DataError(f"{where}: {sentence.word(place)} has {shown(tag)}, which is no tag", hint=_SCHEMES)
    return Sentence(where, sentence.text, spans, list(tags))


def _strings(words: object, where: str) -> list[str]:
    if not isinstance(words, list | tuple):
        raise DataError(f"{where}: the words are {shown(words)}, not a list", hint='Such as ["New", "York"].')
    if not words:
        raise DataError(f"{where}: the sentence has no words")
    for number, word in enumerate(words, start=1):
        if not isinstance(word, str):
            raise DataError(f"{where}: word {number} is {shown(word)}, which is not text")
        if not word.strip():
            raise DataError(f"{where}: word {number} is empty")
    return list(words)


def from_text(row: Mapping[str, Any], where: str) -> Sentence:
    """A sentence of a row with a text and its entities as spans of characters.

    Where a span begins or ends inside a word, the word is cut in two, so that no entity is moved. White space at a
    span's ends is left out of it, for it is part of no word.

    Raises:
        DataError: The text is empty, or an entity is wrong.
    """
    text = row["text"]
    if text is None or (isinstance(text, str) and not text.strip()):
        raise DataError(f"{where}: the text is empty")
    if not isinstance(text, str):
        raise DataError(f"{where}: the text is {shown(text)}, which is not text")
    if "entities" not in row:
        return Sentence(where, text, _words.split(text))
    spans = _words.spans(row["entities"], text, where)
    words = _words.split(text, {border for span in spans for border in (span.start, span.end)})
    return Sentence(where, text, words, _words.tagged(words, spans), sum(span.trimmed for span in spans))
