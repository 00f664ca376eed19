"""Bases that serve the tasks well: what is known of them without a look at the Hub."""

import json
from functools import cache
from typing import Any, Literal, get_args

from lowres_ft import tables
from lowres_ft.errors import ModelError, nearest
from lowres_ft.spec import Spec

TaskName = Literal["classification", "ner", "chat"]


class Entry(Spec):
    """A base on the Hub, or a starter."""

    name: str
    """As `model.base` takes it."""
    parameters: int
    """Of the base, in millions."""
    licence: str
    tasks: tuple[TaskName, ...]
    languages: str
    """ISO 639-1 codes, or `multi` and how many."""
    context: int
    """Tokens that it can take."""
    config: dict[str, Any]
    """What of config.json decides shapes."""

    def speaks(self, language: str) -> bool:
        """Whether it was made for a language."""
        return language in self.languages.split() or self.languages.startswith("multi")


@cache
def entries() -> tuple[Entry, ...]:
    """All of them, small ones first."""
    found = [Entry.model_validate_json(json.dumps(entry)) for entry in tables.read("models")]
    return tuple(sorted(found, key=lambda entry: entry.parameters))


def find(name: str) -> Entry | None:
    """The entry of a name."""
    return next((entry for entry in entries() if entry.name == name), None)


def chosen(task: str | None, language: str | None) -> tuple[Entry, ...]:
    """Those that serve a task and speak a language, where one is asked for.

    Raises:
        ModelError: There is none.
    """
    tasks = get_args(TaskName)
    if task is not None and task not in tasks:
        raise ModelError(f"no task is called '{task}'{nearest(task, tasks)}", hint=f"There are {', '.join(tasks)}.")
    found = tuple(
        entry
        for entry in entries()
        if (task is None or task in entry.tasks) and (language is None or entry.speaks(language))
    )
    if not found:
        raise ModelError(f"no base here speaks '{language}'", hint="Use a code such as en or zh, or no --language.")
    return found
