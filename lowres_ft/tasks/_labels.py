"""Labels: how they are written in rows, found, and told when they are not the task's."""

import itertools
import math
import unicodedata
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

from lowres_ft.errors import DataError, nearest
from lowres_ft.tasks.base import Seen

MOST_LABELS = 1000
_SEPARATORS = (";", ",", "|")
_TRUTH = {"1": True, "true": True, "1.0": True, "0": False, "false": False, "0.0": False}


def as_text(value: object) -> object:
    """A label written as a number or a truth value is the text of it."""
    return str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, int | float) else value


Label = Annotated[str, BeforeValidator(as_text)]


def one(value: object, where: str) -> str:
    """The label that a cell holds.

    Raises:
        DataError: It holds none.
    """
    if is_empty(value):
        raise DataError(f"{where}: the label is empty")
    if not isinstance(value, str | int | float):
        raise DataError(f"{where}: the label is {quoted(value)}, which is neither a word nor a number")
    return str(as_text(value)).strip()


def several(value: object, separator: str, where: str) -> list[str]:
    """The labels that a cell holds as a list or as one text, each once; an empty cell holds none.

    Raises:
        DataError: It holds something else.
    """
    if is_empty(value):
        return []
    if isinstance(value, str):
        parts = (part.strip() for part in value.split(separator))
        return list(dict.fromkeys(part for part in parts if part))
    items = value if isinstance(value, list) else [value]
    numbers = [item for item in items if isinstance(item, int | float)]
    if len(set(numbers)) < len(numbers):
        raise DataError(
            f"{where}: the labels are {quoted(items)}, which names one twice: does a number stand for each label?",
            hint="A list names the labels that a row has. Or each label has a column of its own, with 0 or 1.",
        )
    return list(dict.fromkeys(one(label, where) for label in items))


def by_column(row: Mapping[str, Any], labels: Collection[str], where: str) -> list[str]:
    """The labels whose own column says 1 or true.

    Raises:
        DataError: A column says neither yes nor no.
    """
    found = []
    for label in labels:
        answer = _TRUTH.get(str(row[label]).strip().lower())
        if answer is None:
            raise DataError(f"{where}: the column of {quoted(label)} holds {quoted(row[label])}, not 0 or 1")
        if answer:
            found.append(label)
    return found


def is_empty(value: object) -> bool:
    """Whether a cell holds nothing: null, not-a-number or blank text."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def is_number(label: str) -> bool:
    """Whether a label reads as a finite number."""
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False


def class_of(label: str, labels: tuple[str, ...]) -> int:
    """Exact names first; whole numbers from 0 are indices only where no name is a number.

    Raises:
        KeyError: The label is none of them.
    """
    if label in labels:
        return labels.index(label)
    if any(is_number(name) for name in labels):
        raise KeyError(label)
    if label.isascii() and label.isdigit() and len(label) < 10 and str(int(label)) == label:
        index = int(label)
        if index < len(labels):
            return index
    raise KeyError(label)


def found(seen: Mapping[str, Seen]) -> tuple[str, ...]:
    """The labels of the rows: by value where all are numbers, else by alphabet.

    Raises:
        DataError: Two differ only in spaces, capitals or the form of a number, and so are hardly two classes.
    """
    spelled: dict[str | float, str] = {}
    for label, at in seen.items():
        other = spelled.setdefault(float(label) if is_number(label) else _plain(label), label)
        if other != label:
            raise DataError(
                f"{at.where}: the label {quoted(label)} differs from {quoted(other)} ({seen[other].where}) only in "
                "how it is written",
                hint="Write them alike; or list both in task.labels, if they are two classes.",
            )
    if all(is_number(label) for label in seen):
        return tuple(sorted(seen, key=lambda label: (float(label), label)))
    return tuple(sorted(seen))


def _plain(label: str) -> str:
    """A label without what is hardly meant to tell it from another: capitals, spaces, ways to write one character."""
    return " ".join(unicodedata.normalize("NFKC", label).casefold().split())


def require_separated(seen: Mapping[str, Seen], separator: str) -> None:
    """Refuse labels that are parts of each other when another sign separates them.

    Raises:
        DataError: They are, as 'a,b' and 'b,c' are.
    """
    for sign in _SEPARATORS:
        if sign == separator:
            continue
        owner: dict[str, str] = {}
        for label, at in seen.items():
            for part in {part.strip() for part in label.split(sign)} - {""}:
                other = owner.setdefault(part, label)
                if other == label or sign not in label + other:
                    continue
                joined = label if sign in label else other
                raise DataError(
                    f"{at.where}: the label {quoted(joined)} seems to be several, separated by '{sign}'",
                    hint=f"Labels are separated by '{separator}': use task.separator='{sign}', or list the labels in "
                    f"task.labels if '{sign}' belongs to them.",
                )


def told_unknown(unknown: Mapping[str, Seen], labels: tuple[str, ...]) -> DataError:
    """An error that lists labels that are none of the task's, with file and line."""
    lines = [
        f"{at.where}: unknown label {quoted(label)}{nearest(label, labels)}, {at.count} row{'s' * (at.count > 1)}"
        for label, at in itertools.islice(unknown.items(), 10)
    ]
    more = f"\n  and {len(unknown) - 10} more" if len(unknown) > 10 else ""
    numbers = any(map(is_number, unknown)) and not any(map(is_number, labels))
    return DataError(
        "\n  ".join(lines) + more,
        hint=f"task.labels names {listed(labels)}"
        + (f", for which the numbers 0 to {len(labels) - 1} may stand, in this order" * numbers)
        + ". Correct the rows, list the labels there, or use task.labels=null to find them.",
    )


def stranger(named: object, labels: Collection[str]) -> str:
    """What is wrong with a mapping that names something else than labels; empty where nothing is."""
    if not isinstance(named, dict):
        return ""
    return next(
        (f"holds {label!r}, which is no label{nearest(label, labels)}" for label in named if label not in labels), ""
    )


def quoted(value: object, most: int = 60) -> str:
    """A value as it is told: a label column that is not one may hold whole pages."""
    shown = repr(value)
    return shown if len(shown) <= most else f"{shown[:most]}..."


def listed(labels: Collection[str], most: int = 10) -> str:
    """The first of some labels, and how many more there are."""
    words = [quoted(label) for label in itertools.islice(labels, most)]
    return ", ".join(words) + (f" and {len(labels) - most} more" if len(labels) > most else "")
