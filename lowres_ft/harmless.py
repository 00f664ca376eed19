"""Texts of others on a terminal: what would act on it stands as an escape.

Control sequences clear screens and forge lines, and marks of direction make one name look like another
(https://unicode.org/reports/tr36/, https://trojansource.codes).
"""

import re
import unicodedata

_JOINERS = "\u200c\u200d"  # without which Persian, Indic scripts and many emoji are not written
_SPACES = "Zs"


def harmless(text: str, *, keep: str = "\n\t") -> str:
    r"""`text`, with each mark that is not printed in JSON's escapes (`\u001b`), but for those to `keep`.

    So JSON stays the same JSON, and half a character can be printed too.
    """
    if text.isprintable():
        return text
    return "".join(mark if mark.isprintable() or mark in keep else _escaped(mark) for mark in text)


def _escaped(mark: str) -> str:
    if mark in _JOINERS or unicodedata.category(mark) == _SPACES:
        return mark
    units = mark.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?")
_COMPUTED = tuple("=+-@\t\r\uff1d\uff0b\uff0d\uff20")  # what a formula begins with, also in full width


def cell(text: str) -> str:
    """A cell that a spreadsheet shows and does not compute (https://owasp.org/www-community/attacks/CSV_Injection)."""
    begins = text.startswith(_COMPUTED) or text.lstrip().startswith(_COMPUTED)
    return f"'{text}" if begins and not _NUMBER.fullmatch(text) else text
