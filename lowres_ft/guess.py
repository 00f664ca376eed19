"""A recipe of one's own from a data file: columns and labels are guessed, and what was guessed is told."""

import itertools
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowres_ft import files, readers, recipe, yaml12
from lowres_ft.errors import DataError, OutputError
from lowres_ft.tasks.base import Seen

_ROWS = 1_000_000  # looked at, at the most: files are often sorted by label
_MOST_LABELS = 200
_TEXT_NAMES = ("text", "review", "sentence", "content", "comment", "message", "tweet", "body", "document")
_LABEL_NAMES = ("label", "labels", "class", "category", "sentiment", "stars", "rating", "target", "topic")


@dataclass
class _Column:
    """What was seen of a column."""

    rows: int = 0
    characters: int = 0
    values: dict[str, Seen] = field(default_factory=dict)

    def add(self, value: str, where: str) -> None:
        self.rows += 1
        self.characters += len(value)
        before = self.values.get(value)
        if before or len(self.values) <= _MOST_LABELS:
            self.values[value] = Seen(before.count + 1, before.where) if before else Seen(1, where)


def new(name: str, start: str, source: str | None) -> dict[str, Any]:
    """Write `<name>.yaml` into the current folder, from a recipe and, if given, a data source.

    Returns:
        `path` of the file, and `guessed`: a sentence for each thing that was guessed.

    Raises:
        RecipeError: `name` cannot be a recipe's name.
        OutputError: The file exists.
        DataError: The source cannot be read, or no column can be the text or the label.
    """
    path = Path(f"{name}.yaml")
    if path.exists():
        raise OutputError(f"{path} exists", hint="Choose another name, or remove it.")
    raw = recipe.raw(start)
    raw["name"] = name
    guessed: list[str] = []
    if source is not None:
        columns, labels, guessed = _guess(source)
        raw["summary"] = (
            f"Tell {', '.join(labels[:5])} apart." if len(labels) <= 5 else f"Tell {len(labels)} labels apart."
        )
        before = raw.get("task")
        kept = {key: before[key] for key in ("max_length",) if isinstance(before, dict) and key in before}
        raw["task"] = {"kind": "classification", "labels": labels} | kept
        raw["data"] = {"train": source} | ({"columns": columns} if columns else {})
    text = yaml12.dumps(raw)
    recipe.parse(yaml12.loads(text, where=str(path)), where=str(path))
    files.write_bytes(path, text.encode())
    return {"path": str(path), "guessed": guessed}


def _guess(source: str) -> tuple[dict[str, str], list[str], list[str]]:
    """Columns by role where their names differ, labels, and sentences that tell both."""
    seen: defaultdict[str, _Column] = defaultdict(_Column)
    rows = itertools.islice(readers.rows(source), _ROWS)
    for where, row in rows:
        for column, value in row.items():
            if isinstance(value, str | int | float) and value == value:
                seen[column].add(str(value).lower() if isinstance(value, bool) else str(value), where)
    label = _label_column(seen, source)
    text = _text_column(seen, label, source)
    labels = _labels(seen[label].values)
    columns = {role: name for role, name in (("text", text), ("label", label)) if role != name}
    shares = ", ".join(f"{name!r} ({seen[label].values[name].count})" for name in labels[:10])
    more = f" and {len(labels) - 10} more" if len(labels) > 10 else ""
    average = seen[text].characters / seen[text].rows
    return (
        columns,
        labels,
        [
            f"text: column '{text}', {average:.0f} characters on average",
            f"label: column '{label}', {len(labels)} labels: {shares}{more}",
            *([f"looked at the first {_ROWS:,} rows only"] if seen[text].rows >= _ROWS else []),
        ],
    )


def _label_column(seen: dict[str, _Column], source: str) -> str:
    """The column whose name says so, else the one with the fewest values that repeat."""
    fits = [name for name, column in seen.items() if 2 <= len(column.values) <= _MOST_LABELS]
    named = [name for wanted in _LABEL_NAMES for name in fits if name.casefold() == wanted]
    repeating = [name for name in fits if len(seen[name].values) <= seen[name].rows / 2]
    if not (named or repeating):
        found = ", ".join(
            f"'{name}' ({len(column.values) if len(column.values) <= _MOST_LABELS else 'more'})"
            for name, column in seen.items()
        )
        raise DataError(
            f"{source}: no column has between 2 and {_MOST_LABELS} values that repeat; values by column: {found}",
            hint="Leave out --data, and name the columns in the recipe: data.columns: {text: NAME, label: NAME}.",
        )
    return named[0] if named else min(repeating, key=lambda name: len(seen[name].values))


def _text_column(seen: dict[str, _Column], label: str, source: str) -> str:
    """The column whose name says so, else the one with the longest values."""
    others = [name for name in seen if name != label]
    if not others:
        raise DataError(f"{source}: there is no column beside '{label}'", hint="A text and a label are needed.")
    named = [name for wanted in _TEXT_NAMES for name in others if name.casefold() == wanted]
    return named[0] if named else max(others, key=lambda name: seen[name].characters / max(1, seen[name].rows))


def _labels(values: dict[str, Seen]) -> list[str]:
    """The labels in the order in which the task would find them."""
    from lowres_ft.tasks.classification import Classification

    if empty := values.get(""):
        raise DataError(f"{empty.where}: the label is empty, in {empty.count} rows", hint="Fill or remove the rows.")
    return list(Classification().resolve(values).classes)
