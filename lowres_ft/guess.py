"""A recipe of one's own from a data file: task, columns and labels are guessed, and what was guessed is told."""

import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowres_ft import files, readers, recipe, yaml12
from lowres_ft.errors import DataError, OutputError, RecipeError
from lowres_ft.tasks.base import Seen, Task

_ROWS = 1_000_000  # looked at, at the most: files are often sorted by label
_READ = 1000  # rows that a task reads, to see that it can
_MOST_LABELS = 200
_CLASSIFICATION = "classification"
_STARTS = {_CLASSIFICATION: "sentiment-lora", "chat": "chat-lora-int8", "ner": "entities-lora"}
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


def new(name: str, start: str | None, source: str | None) -> dict[str, Any]:
    """Write `<name>.yaml` into the current folder, from a recipe and, if given, a data source.

    Without `start` the recipe to begin with follows from what the rows look like.

    Returns:
        `path` of the file, and `guessed`: a sentence for each thing that was guessed.

    Raises:
        RecipeError: `name` cannot be a recipe's name, or there is no recipe `start`.
        OutputError: The file exists.
        DataError: The source cannot be read, or its rows are not what the task reads.
    """
    path = Path(f"{name}.yaml")
    if os.path.exists(path):
        raise OutputError(f"{path} exists", hint="Choose another name, or remove it.")
    guessed: list[str] = []
    if start is None:
        start = _STARTS[_CLASSIFICATION if source is None else _looks_like(source)]
        guessed += [] if source is None else [f"starting from {start}; another one is named with --from"]
    raw = recipe.raw(start)
    raw["name"] = name
    if source is not None:
        task = raw.get("task")
        kind = task.get("kind", _CLASSIFICATION) if isinstance(task, dict) else _CLASSIFICATION
        guessed += _classify(raw, source) if kind == _CLASSIFICATION else _put(raw, source)
    text = yaml12.dumps(raw)
    parsed = recipe.parse(yaml12.loads(text, where=str(path)), where=str(path))
    if source is not None and parsed.task.kind != _CLASSIFICATION:
        guessed.append(_read(parsed, source))
    files.write_bytes(path, text.encode())
    return {"path": str(path), "guessed": guessed}


def _looks_like(source: str) -> str:
    """The kind of task that the first row of a source is for."""
    row = next((row for _, row in readers.rows(source)), {})
    lists = {column for column, value in row.items() if isinstance(value, list)}
    pairs = ({"instruction", "output"}, {"prompt", "completion"})
    found = _CLASSIFICATION
    if lists & {"messages", "conversations"} or any(row.keys() >= pair for pair in pairs):
        found = "chat"
    elif lists >= {"words", "tags"}:
        found = "ner"
    return found if _STARTS[found] in recipe.shipped() else _CLASSIFICATION


def _classify(raw: dict[str, Any], source: str) -> list[str]:
    """Put a table of texts and labels into a recipe; return what was guessed of it."""
    columns, labels, guessed = _guess(source)
    raw["summary"] = f"Tell {', '.join(labels[:5])} apart." if len(labels) <= 5 else f"Tell {len(labels)} labels apart."
    before = raw.get("task")
    kept = {key: before[key] for key in ("max_length",) if isinstance(before, dict) and key in before}
    raw["task"] = {"kind": _CLASSIFICATION, "labels": labels} | kept
    raw["data"] = {"train": source} | ({"columns": columns} if columns else {})
    return guessed


def _put(raw: dict[str, Any], source: str) -> list[str]:
    """Put a source into a recipe whose task stays; labels are found when it runs."""
    from lowres_ft import registry

    raw["summary"] = f"The task {raw['task']['kind']}, learned from {source}."
    try:
        if "labels" in registry.load("tasks", raw["task"]["kind"]).model_fields:
            raw["task"]["labels"] = None
    except RecipeError:
        return []  # told by the parser, by its path
    before = raw["data"] if isinstance(raw.get("data"), dict) else {}
    # What names or maps the other source goes with it.
    kept = {key: value for key, value in before.items() if key not in ("train", "columns", "limit")}
    raw["data"] = {"train": source} | {key: value for key, value in kept.items() if not isinstance(value, str)}
    return []


def _read(parsed: recipe.Recipe, source: str) -> str:
    """Read the first rows as the recipe's task does, and say what they hold.

    Raises:
        DataError: They cannot be read.
    """
    from lowres_ft.data import by_role

    task: Task = parsed.task
    forms: Counter[str] = Counter()
    for where, row in itertools.islice(readers.rows(source), _READ):
        values: Mapping[str, Any] = by_role(row, where, task.forms, {})
        task.read(values, where)
        forms[" and ".join(values)] += 1
    told = "; ".join(f"{form} ({count:,})" for form, count in forms.most_common())
    return f"{task.kind}: the first {forms.total():,} rows can be read; what they hold is {told}"


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
