"""A few rows in another script or another language than the rest."""

import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from lowres_ft.checks._survey import Part, Survey, shown, texts
from lowres_ft.checks.base import Check, Finding
from lowres_ft.files import writing

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

_TOGETHER = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "KATAKANA-HIRAGANA": "CJK", "HALFWIDTH": "CJK", "BOPOMOFO": "CJK"}
"""Scripts that are written together; HALFWIDTH stands before the names of narrow kana."""
_PASSED = {"FULLWIDTH", "MATHEMATICAL", "MODIFIER", "FEMININE", "MASCULINE", "MICRO", "OHM", "KELVIN", "ANGSTROM"}
"""First words of the names of letters that are signs, or forms of Latin ones."""
_NO_LANGUAGE = ("und", "zxx")
_CHARACTERS = 1000  # of a text that are looked at


class Languages(Check):
    """A few rows in another script or another language than the rest."""

    kind: Literal["languages"] = "languages"
    sample: int = Field(default=20_000, ge=1)
    """Rows of a split that are looked at, at the most."""
    few: float = Field(default=0.1, gt=0, lt=1)
    """Share of the rows up to which another script or language is a stranger; above, the data are multilingual."""
    letters: int = Field(default=40, ge=1)
    """Letters of a text whose language can be told."""
    sure: float = Field(default=0.999, gt=0, lt=1)
    """Probability, as langid tells it, from which another language is believed."""
    gravest = "info"

    def find(self, survey: Survey) -> Iterator[Finding]:
        identifier = None
        for part in survey.parts.values():
            positions = part.sample(survey.most or self.sample)
            said = [" ".join(texts(example))[:_CHARACTERS] for example in part.examples(positions)]
            scripts = [_script(text) for text in said]
            usual, strange = self._strangers(scripts)
            if strange:
                yield self._told(part, positions, said, strange, "script", usual)
            identifier = identifier or _identifier()
            tongues = self._languages(identifier, said, scripts, usual)
            usual, strange = self._strangers(tongues)
            if strange:
                yield self._told(part, positions, said, strange, "language", usual)

    def _strangers(self, found: list[str | None]) -> tuple[str, dict[int, str]]:
        """The usual one, and the rows with another one where those are few."""
        counts = Counter(one for one in found if one is not None)
        if len(counts) < 2:
            return next(iter(counts), ""), {}
        usual, count = counts.most_common(1)[0]
        if count < (1 - self.few) * counts.total():
            return usual, {}
        return usual, {row: one for row, one in enumerate(found) if one not in (None, usual)}

    def _languages(
        self, identifier: "LanguageIdentifier", said: list[str], scripts: list[str | None], usual: str
    ) -> list[str | None]:
        """The language of each text of the usual script that is long enough, where it is sure."""
        found: list[str | None] = []
        for text, script in zip(said, scripts, strict=True):
            if script != usual or sum(map(str.isalpha, text)) < self.letters:
                found.append(None)
                continue
            language, probability = identifier.classify(text)
            found.append(str(language) if probability >= self.sure and language not in _NO_LANGUAGE else None)
        return found

    def _told(
        self, part: Part, positions: np.ndarray, said: list[str], strange: dict[int, str], what: str, usual: str
    ) -> Finding:
        counts = ", ".join(f"{name} {count}" for name, count in Counter(strange.values()).most_common(5))
        rows = list(strange)
        message = f"texts are of another {what} than the others, which are {usual}: {counts}; {shown(said[rows[0]])}"
        hint = "So few teach nothing of it, and the base may not know it: remove them, or add many more."
        return part.finding(f"foreign_{what}", self.gravest, positions[rows], message, hint, of=len(positions))


def _identifier() -> "LanguageIdentifier":
    """What tells languages: 100 MB, unpacked in half a second."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    with writing(Path(tempfile.gettempdir()), hint="Make room there, or name another folder in TMPDIR."):
        return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _script(text: str) -> str | None:
    """The script of most letters of a text; None where it has none."""
    if text.isascii():
        return "LATIN" if any(map(str.isalpha, text)) else None
    counts = Counter(filter(None, map(_script_of, text)))
    return counts.most_common(1)[0][0] if counts else None


@lru_cache(maxsize=65536)
def _script_of(mark: str) -> str | None:
    """The script of a letter, which is the first word of its name in Unicode; None for other characters."""
    if not mark.isalpha():
        return None
    first = unicodedata.name(mark, "").partition(" ")[0]
    return None if not first or first in _PASSED else _TOGETHER.get(first, first)
