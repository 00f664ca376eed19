"""Damage that a text shows by itself, a bit for each kind."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache

_TAGS = (
    "a abbr article b blockquote body br button center code div em font footer form h[1-6] head header hr html i "
    "iframe img input label li link main meta nav noscript ol option p pre script section select small span strong "
    "style sub sup svg table tbody td th thead title tr tt u ul video"
)
_TAG = re.compile(rf"</?(?:{'|'.join(_TAGS.split())})(?:\s[^<>]*)?/?>|<!--|<!doctype\b", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:[a-z]{2,8}\d{0,2}|#\d{2,7}|#x[0-9a-f]{2,6});", re.IGNORECASE)
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# Zero-width space, soft hyphen, byte order mark, marks of direction, tags; not the joiners, which scripts need.
_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\U000e0000-\U000e007f]")
# Not in the middle of small letters, as in a path: C:\\new.
_ESCAPE = re.compile(r"\\[nrt](?=[A-Z\s\\]|$)|(?<=[.!?,;:)\s])\\[nrt]|\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|\\[\"']")
_PLACEHOLDER = re.compile(
    r"\W*(?:null|none|nan|na|n/a|nil|undefined|missing|empty|unknown|deleted|removed|no text|no comment|no review"
    r"|no content|lorem ipsum.*|test|todo|tbd|xxx+)\W*|#(?:n/a|ref!|value!|name\?|div/0!)",
    re.IGNORECASE,
)
_PLAIN = re.compile(r"[<&\\\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_LONGEST_PLACEHOLDER = 40
_BROKEN = "\ufffd"


def _mojibake(text: str) -> bool:
    """Whether ftfy would read the text's characters as those of another encoding, such as 'Ã©' for 'é'."""
    if text.isascii():
        return False
    import ftfy

    return bool(ftfy.fix_encoding(text) != text)


def _placeholder(text: str) -> bool:
    return len(text) <= _LONGEST_PLACEHOLDER and bool(_PLACEHOLDER.fullmatch(text.strip()))


def _wordless(text: str) -> bool:
    """Whether no character is a letter, a digit or a symbol such as an emoji."""
    return not any(map(_says_something, text))


@lru_cache(maxsize=65536)
def _says_something(mark: str) -> bool:
    category = unicodedata.category(mark)
    return category[0] in "LN" or category == "So"


_EACH: dict[str, Callable[[str], object]] = {
    "mojibake": _mojibake,
    "replacement_characters": lambda text: _BROKEN in text,
    "markup": _TAG.search,
    "html_entities": _ENTITY.search,
    "control_characters": _CONTROL.search,
    "invisible_characters": _INVISIBLE.search,
    "escapes": _ESCAPE.search,
    "placeholder_texts": _placeholder,
    "wordless_texts": _wordless,
}
KINDS = tuple(_EACH)
"""The kinds of damage, by the place of their bit."""
_ALWAYS = ("placeholder_texts", "wordless_texts")


_HIDES = {"mojibake": "control_characters"}
"""Damage that shows as another one too, which need not be told then: cp1252's signs read as Latin-1."""


def marks(texts: Sequence[str]) -> int:
    """The bits of what any of some texts shows."""
    found = 0
    for text in texts:
        plain = text.isascii() and not _PLAIN.search(text)
        for place, (kind, shows) in enumerate(_EACH.items()):
            if (not plain or kind in _ALWAYS) and shows(text):
                found |= 1 << place
    for kind, other in _HIDES.items():
        if found >> KINDS.index(kind) & 1:
            found &= ~(1 << KINDS.index(other))
    return found
