"""Is the data of a recipe sound? Every check looks at it, before a weight of the base is loaded."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lowres_ft import assets, bases, data, forked, limits, registry
from lowres_ft.checks._survey import Survey
from lowres_ft.checks.base import SEVERITIES, Check, Finding
from lowres_ft.data import Data
from lowres_ft.events import Fetching, Listener, Note, Stage, unheard
from lowres_ft.recipe import Recipe
from lowres_ft.tokenizing import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FEW = 2000  # rows of a split of which a run takes samples
_MANY = 200_000  # rows of a split that a run looks at


@dataclass(frozen=True)
class Checked:
    """What was found in the data of a recipe."""

    rows: dict[str, int]
    """Rows of each split."""
    labels: tuple[str, ...]
    notes: tuple[str, ...]
    """How the rows were read."""
    findings: tuple[Finding, ...]
    """Errors first."""
    samples: dict[str, dict[str, int]]
    """By the name of a check, and of a split that is larger, how many rows it looked at."""

    @property
    def wrong(self) -> bool:
        """Whether something was found that makes a result wrong."""
        return any(finding.severity == "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Everything, as other programs read it."""
        return {
            "rows": self.rows,
            "labels": list(self.labels),
            "notes": list(self.notes),
            "samples": self.samples,
            "findings": [finding.model_dump(mode="json") for finding in self.findings],
        }


def check(recipe: Recipe, *, listen: Listener = unheard) -> Checked:
    """Read the data of a recipe and look for what is wrong with it; of the base, the tokenizer alone is loaded.

    Raises:
        LowresError: The data cannot be used; what `run` would raise, in the same words.
    """
    progress: assets.Progress = lambda what, done, total: listen(Fetching(what, done, total))  # noqa: E731
    for text in recipe.notes:
        listen(Note(text))
    with tempfile.TemporaryDirectory(prefix="lowres-ft-") as folder:
        listen(Stage(f"reading {recipe.data.train}"))
        rows = data.load(recipe, Path(folder), progress)
        tokenizer = load_tokenizer(bases.resolve(recipe.model, progress).folder)
        rows.task.prepare(tokenizer)
        listen(Stage("looking at every row"))
        survey = Survey.of(rows, tokenizer)
        found: list[Finding] = []
        for one in _checks():
            listen(Stage(f"checking {one.kind}"))
            found += one.find(survey)
        sizes = {name: len(split) for name, split in rows.splits().items()}
        samples = dict(_samples(survey))
    labels: tuple[str, ...] = getattr(rows.task, "labels", None) or ()
    return Checked(sizes, labels, rows.notes, _ordered(found), samples)


def brief(rows: Data, tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    """What matters most, a line for each kind, for a run that begins; with many rows, without what takes long."""
    many = max(len(split) for split in rows.splits().values()) > _FEW
    survey = Survey.of(rows, tokenizer, first=_MANY, most=_FEW)
    looking = [one for one in _checks() if one.gravest != "info" and not (many and one.costly)]
    costly = [one for one in looking if one.costly]
    found = [finding for one in looking if not one.costly for finding in one.find(survey)]

    def looked() -> list[Finding]:
        return [finding for one in costly for finding in one.find(survey)]

    if costly:
        try:  # in a child: 0.1 GB would stay until the run's end
            found += forked.result(looked, brings=forked.SCIKIT_LEARN, room=limits.room_beside())
        except forked.NoRoomError as error:
            left = ", ".join(one.kind for one in costly)
            yield f"check: {left} failed within the memory that was left ({error}); `lowres-ft check` looks at all"
    by_kind: dict[str, list[Finding]] = {}
    for finding in _ordered(found):
        if finding.severity != "info":
            by_kind.setdefault(finding.kind, []).append(finding)
    for first, *others in by_kind.values():
        also = f" (also in {', '.join(dict.fromkeys(one.split for one in others))})" if others else ""
        yield f"check: {line(first)}{also}"


def line(finding: Finding) -> str:
    """A finding in one line: where, how many, what."""
    looked = f"{finding.count:,} of {finding.of:,} rows" + " looked at" * finding.sampled if finding.count else "labels"
    return f"{finding.kind}, {finding.split}, {looked}: {finding.message}"


def _checks() -> Iterator[Check]:
    for name in registry.names("checks"):
        yield cast("Check", registry.load("checks", name)())


def _samples(survey: Survey) -> Iterator[tuple[str, dict[str, int]]]:
    for one in _checks():
        most: int | None = getattr(one, "sample", None)
        if most is not None:
            looked = {name: len(part.sample(most)) for name, part in survey.parts.items()}
            if fewer := {name: count for name, count in looked.items() if count < len(survey.parts[name])}:
                yield one.kind, fewer


def _ordered(found: list[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(found, key=lambda one: SEVERITIES.index(one.severity)))
