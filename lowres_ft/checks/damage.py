"""Texts that lost something on their way: a wrong encoding, markup, characters that nobody sees."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import Field

from lowres_ft.checks import _marks
from lowres_ft.checks._survey import Part, Survey, shown, texts
from lowres_ft.checks.base import Check, Finding

_TOLD = {
    "mojibake": (
        "were read in a wrong encoding once ('Ã©' for 'é')",
        "Export them again as UTF-8, or mend them with ftfy.fix_encoding: the model never saw such words.",
    ),
    "replacement_characters": (
        "hold U+FFFD, which stands for characters that were lost",
        "Export them again from where they came; what was lost cannot be mended.",
    ),
    "markup": ("hold HTML tags", "The model would learn from the tags: data.clean=[strip_html]."),
    "html_entities": ("hold HTML entities such as &amp;", "data.clean=[strip_html] writes the characters they name."),
    "control_characters": (
        "hold control characters",
        "Mend the export: tokenizers make unknown pieces of them, or drop them.",
    ),
    "invisible_characters": (
        "hold characters that nobody sees, such as zero-width spaces",
        "Remove them: they cut words in two for the tokenizer, and make equal texts differ.",
    ),
    "escapes": (
        r"hold written-out escapes such as \n or \u00e9",
        "They were escaped twice: read the source with a JSON or CSV reader once more.",
    ),
    "placeholder_texts": (
        "are placeholders such as 'null' or '[deleted]', not texts",
        "Remove the rows: their labels belong to something that is not there.",
    ),
    "wordless_texts": ("have no letter, digit or symbol", "Remove the rows, or give them their text back."),
}


class Damage(Check):
    """Texts that lost something on their way."""

    kind: Literal["damage"] = "damage"
    warn_from: float = Field(default=0.005, gt=0, le=1)
    """Share of a split's rows from which damage is a warning; below, it is an info."""

    def find(self, survey: Survey) -> Iterator[Finding]:
        for part in survey.parts.values():
            for place, kind in enumerate(_marks.KINDS):
                rows = np.flatnonzero(part.marks >> place & 1)
                if len(rows):
                    yield self._told(part, kind, rows)

    def _told(self, part: Part, kind: str, rows: np.ndarray) -> Finding:
        what, hint = _TOLD[kind]
        first = part.first(rows)[:1]
        said = next(" ".join(texts(example)) for example in part.examples(first))
        if "strip_html" in hint and part.task.spans_refer_to_text:
            hint = "Mend them before the places of entities are counted: cleaning would move them."
        severe = len(rows) >= self.warn_from * len(part) or kind == "replacement_characters"
        message = f"texts {what}, first {shown(said)}"
        return part.finding(kind, "warning" if severe else "info", rows, message, hint)
