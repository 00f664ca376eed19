"""How many rows there are, and how many of each label."""

from collections import Counter
from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import Field

from lowres_ft.checks._survey import Part, Survey
from lowres_ft.checks.base import Check, Finding

_NAMED = 5  # classes that a message names


class Balance(Check):
    """How many rows there are, and how many of each label."""

    kind: Literal["balance"] = "balance"
    few_rows: int = Field(default=100, ge=1)
    """Training rows, and rows of a held-out split, below which that is told."""
    rare: int = Field(default=10, ge=1)
    """Training rows of a label below which it is told as rare."""
    dominant: float = Field(default=0.9, gt=0, lt=1)
    """Share of the rows of one label from which it is told."""
    shifted: float = Field(default=0.15, gt=0, lt=1)
    """Total variation distance between the labels' shares in train and in a held-out split from which it is told."""

    def find(self, survey: Survey) -> Iterator[Finding]:
        for part in survey.parts.values():
            if len(part) < self.few_rows:
                yield _few(part)
        counts = {name: _counts(part) for name, part in survey.parts.items()}
        if not counts["train"]:
            return
        yield from self._rare(survey.train, counts["train"])
        yield from self._dominant(survey, counts["train"])
        for part in survey.held:
            yield from _missing(part, counts["train"], counts[part.name])
            yield from self._shifted(survey, part, counts["train"], counts[part.name])

    def _rare(self, train: Part, counts: Counter[str]) -> Iterator[Finding]:
        few = sorted((count, label) for label, count in counts.items() if count < self.rare)
        if few and len(train) >= self.few_rows:
            told = ", ".join(f"{label!r} ({count})" for count, label in few[:_NAMED])
            more = f" and {len(few) - _NAMED} more" if len(few) > _NAMED else ""
            rows = _having(train, {label for _, label in few})
            message = f"{len(few)} labels have fewer than {self.rare} training rows: {told}{more}"
            hint = "Too few to learn from or to measure: add rows, join them with another label, or leave them out."
            yield train.finding("rare_label", "warning", rows, message, hint)

    def _dominant(self, survey: Survey, counts: Counter[str]) -> Iterator[Finding]:
        label, count = counts.most_common(1)[0]
        total = len(survey.train)
        if survey.has_classes and count >= self.dominant * total:
            message = f"{count / total:.0%} of the training rows have the label {label!r}"
            hint = "Accuracy says little here: look at f1_macro, and try task.class_weights=balanced."
            rows = np.setdiff1d(np.arange(total), _having(survey.train, {label}))
            yield survey.train.finding("dominant_label", "warning", rows, message, hint)

    def _shifted(self, survey: Survey, part: Part, train: Counter[str], held: Counter[str]) -> Iterator[Finding]:
        if not held or not survey.has_classes or min(len(part), len(survey.train)) < self.few_rows:
            return
        shares = {label: (train[label] / train.total(), held[label] / held.total()) for label in train}
        distance = sum(abs(one - other) for one, other in shares.values()) / 2
        if distance >= self.shifted:
            label, (ours, theirs) = max(shares.items(), key=lambda item: abs(item[1][0] - item[1][1]))
            message = (
                f"labels are spread otherwise than in train: {label!r} has {theirs:.0%} of them here, {ours:.0%} there"
            )
            hint = "Scores will not carry over from one to the other; draw both from the same source."
            yield part.finding("shifted_labels", "warning", np.arange(0), message, hint)


def _counts(part: Part) -> Counter[str]:
    """How many rows have each label, by the task's names where there is an index instead."""
    found: Counter[str] = Counter()
    names = part.task.names if part.task.kind == "classification" else ()
    for labels, count in Counter(part.rows.labels).items():
        for label in labels:
            found[names[part.task.class_of(label)] if names else label] += count
    return found


def _having(part: Part, labels: set[str]) -> np.ndarray:
    """Positions of the rows with any of some labels."""
    wanted = {own for own in set(part.rows.labels) if any(_name(part, label) in labels for label in own)}
    return np.array([row for row, own in enumerate(part.rows.labels) if own in wanted], dtype=np.int64)


def _name(part: Part, label: str) -> str:
    return part.task.names[part.task.class_of(label)] if part.task.kind == "classification" else label


def _few(part: Part) -> Finding:
    if part.name == "train":
        message, hint = "so few rows teach little", "`lowres-ft curve` tells what more of them would bring."
    else:
        message = "so few rows leave a score uncertain"
        if part.task.kind == "classification":
            # The widest 95 % interval of a share is 1.96 * sqrt(0.25 / n) to each side.
            message += f", by up to {min(1.0, 1.96 * (0.25 / len(part)) ** 0.5):.2f} to each side"
        hint = f"Hold out more (data.{part.name}), or take differences between scores for chance."
    return part.finding("few_rows", "warning", np.arange(len(part)), message, hint)


def _missing(part: Part, train: Counter[str], held: Counter[str]) -> Iterator[Finding]:
    lost = [label for label in train if label not in held]
    if lost:
        told = ", ".join(map(repr, lost[:_NAMED])) + (f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else "")
        message = f"no row here has {told}, which train has"
        hint = "Their scores cannot be told, and count as 0 in macro averages; hold out rows of each label."
        yield part.finding("missing_label", "warning", np.arange(0), message, hint)
