"""Bases that serve the tasks well: what is known of them without a look at the Hub."""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

from lowres_ft import tables
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


def fitting(task: str | None, language: str | None) -> Iterator[Entry]:
    """Those that serve a task and speak a language, where one is asked for."""
    for entry in entries():
        if (task is None or task in entry.tasks) and (language is None or entry.speaks(language)):
            yield entry
