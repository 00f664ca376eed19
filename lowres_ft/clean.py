"""Cleaning texts before they are learned from: the same for training, evaluation and prediction."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from html.parser import HTMLParser
from typing import Any

from lowres_ft.errors import DataError, nearest
from lowres_ft.tasks.base import Task

Cleaner = Callable[[str], str]

_STOPWORDS = "stopwords:"
_UNSPACED = ("ja", "th", "zh")
_INLINE = (
    "a abbr acronym b bdi bdo big cite code data del dfn em font i ins kbd label mark nobr q s samp small span strike "
    "strong sub sup time tt u var wbr"
)
"""Elements that may stand in the middle of a word; all others end one."""
_HIDDEN = ("script", "style")
_END = r"""[^\s<>"\u3000-\u30ff\u3400-\u9fff\uff00-\uffef.,;:!?'*_~()\[\]{}]"""
_URL = re.compile(
    r"""(?<![a-z0-9])(?:https?://|ftp://|www\.)[^\s<>"\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]*""" + _END, re.IGNORECASE
)
_EMAIL = re.compile(r"(?<![\w.+@-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+(?![\w@-])")
_WORD = re.compile(r"\s*\S+")


def known(name: str) -> str:
    """The name of a cleaner.

    Raises:
        ValueError: It is none.
    """
    if wrong := _problem(name):
        raise ValueError(wrong)
    return name


def _problem(name: str) -> str | None:
    if name in _CLEANERS:
        return None
    kind, colon, language = name.partition(":")
    if kind + ":" != _STOPWORDS:
        names = (*_CLEANERS, f"{_STOPWORDS}LANG")
        return f"is {name!r}, which is no cleaner" + (nearest(name, names) or f"; there are {', '.join(names)}")
    from stopwordsiso import langs

    if language in langs() and language not in _UNSPACED:
        return None
    spaced = sorted(langs() - set(_UNSPACED))
    if not colon or not language:
        return f"is {name!r}, which names no language; write {_STOPWORDS}en, or another of {', '.join(spaced)}"
    if language in _UNSPACED:
        return f"is {name!r}, but that language puts no spaces between words, so its stop words cannot be told"
    told = nearest(language, spaced) or f"; there are {', '.join(spaced)}"
    return f"is {name!r}, but no stop words are known of the language {language!r}{told}"


@lru_cache
def cleaner(names: tuple[str, ...]) -> Cleaner:
    """A function that applies the named cleaners in order."""
    parts = [_CLEANERS[name] if name in _CLEANERS else _without(name.removeprefix(_STOPWORDS)) for name in names]

    def clean(text: str) -> str:
        for part in parts:
            text = part(text)
        return text

    return clean


def cleaned(task: Task, example: Any, names: Sequence[str]) -> Any:
    """An example of a task with its texts cleaned; the same one where nothing is named.

    Raises:
        DataError: A text is empty afterwards.
    """
    return task.cleaned(example, cleaner(tuple(names))) if names else example


def require_left(text: str, what: str) -> str:
    """A cleaned text.

    Raises:
        DataError: Nothing is left of it; `what` names it, with file and line.
    """
    if not text.strip():
        raise DataError(f"{what} is empty after cleaning (data.clean)", hint="Remove the row, or clean less.")
    return text


def require_utf8(text: str, what: str) -> str:
    """A text that is whole.

    Raises:
        DataError: It holds half a character, as an argument or a line that is not UTF-8 does.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} is not UTF-8 (at character {error.start + 1})", hint="Send UTF-8 text.") from error
    return text


def _unicode(text: str) -> str:
    """Composed characters (NFC), so that one text has one form."""
    return unicodedata.normalize("NFC", text)


def _whitespace(text: str) -> str:
    """One space for each run of white space, none at the ends."""
    return " ".join(text.split())


class _Visible(HTMLParser):
    """Collects what a reader of a page sees."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _HIDDEN:
            self.hidden = tag
        self._end_word(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._end_word(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == self.hidden:
            self.hidden = ""
        self._end_word(tag)

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)

    def parse_html_declaration(self, i: int) -> int:
        """Pass over `<![...>` as browsers do; the library would want a known word in it, and fail."""
        return self.parse_bogus_comment(i) if self.rawdata.startswith("<![", i) else super().parse_html_declaration(i)

    def _end_word(self, tag: str) -> None:
        if tag not in _INLINE.split() and not self.hidden:
            self.parts.append(" ")


def _strip_html(text: str) -> str:
    """What a reader of a page sees: tags, comments, scripts and styles away, entities as the characters they name."""
    if "<" not in text and "&" not in text:
        return text
    parser = _Visible()
    parser.feed(text)
    parser.close()
    return "".join(parser.parts)


def _mask_urls(text: str) -> str:
    """`URL` for each web address and `EMAIL` for each e-mail address."""
    return _EMAIL.sub("EMAIL", _URL.sub("URL", text))


def _without(language: str) -> Cleaner:
    """A cleaner that leaves out the stop words of a language, with the white space before them."""
    from stopwordsiso import stopwords

    words = {_core(word).casefold() for word in stopwords(language)} - {""}

    def kept(found: re.Match[str]) -> str:
        token = found[0]
        core = _core(token)
        if core.casefold().replace("\u2019", "'") not in words:
            return token
        return token.strip().replace(core, "", 1)  # signs beside the word stay, at the word before

    return lambda text: _WORD.sub(kept, text).strip()


def _core(token: str) -> str:
    """A word without the white space and the signs around it."""
    start, stop = 0, len(token)
    while start < stop and _is_outside(token[start]):
        start += 1
    while stop > start and _is_outside(token[stop - 1]):
        stop -= 1
    return token[start:stop]


def _is_outside(mark: str) -> bool:
    return mark.isspace() or unicodedata.category(mark)[0] in "PS"


_CLEANERS: dict[str, Cleaner] = {
    "unicode": _unicode,
    "whitespace": _whitespace,
    "strip_html": _strip_html,
    "lowercase": str.lower,
    "mask_urls": _mask_urls,
}
