"""Seeded, stratified parts of rows in which equal texts stay on one side."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lowres_ft.errors import DataError
from lowres_ft.tasks.base import Ragged, Task

_TOLD = 10  # classes that are named at the most


@dataclass(frozen=True)
class Keys:
    """What a split looks at, of N rows."""

    texts: Ragged
    """Hashes (uint64) of each row's texts; rows that share one stay together."""
    labels: Sequence[tuple[str, ...]]
    """(N,) each row's labels."""

    def groups(self) -> np.ndarray:
        """(N,) the least hash among all rows that hang together with each row."""
        rows, starts = self.texts.row_of, self.texts.starts
        if (np.diff(starts) == 1).all():
            return self.texts.values
        hashes, text = np.unique(self.texts.values, return_inverse=True)
        least = np.arange(len(hashes))  # of each text one that hangs together with it, and in the end the least
        beside = text[starts[:-1][rows]]  # the first text of the row in which each one stands
        while ((one := least[text]) != (other := least[beside])).any():
            np.minimum.at(least, np.maximum(one, other), np.minimum(one, other))
            least = least[least]
        found: np.ndarray = np.full(len(self.texts), np.iinfo(np.uint64).max, dtype=np.uint64)
        found[rows] = hashes[least[text]]
        return found

    def classes(self, task: Task) -> np.ndarray:
        """(N,) the rarest class of each row; -1 for a row without a label."""
        class_of = {label: task.class_of(label) for label in {label for labels in self.labels for label in labels}}
        counts = np.zeros(max(class_of.values(), default=0) + 1, dtype=np.int64)
        for labels in self.labels:
            for label in labels:
                counts[class_of[label]] += 1
        found = [
            min((class_of[label] for label in labels), key=lambda c: (counts[c], c), default=-1)
            for labels in self.labels
        ]
        return np.array(found, dtype=np.int64)

    def name(self, task: Task, index: int) -> str:
        """A label of a class (or of none), as it first stands in the rows."""
        found = (label for labels in self.labels for label in labels if task.class_of(label) == index)
        return next(found, "")


def split(rows: Keys, task: Task, shares: Mapping[str, float], seed: int) -> dict[str, np.ndarray]:
    """Seeded, stratified parts of rows: positions by name, and what is left as 'train', each in a shuffled order.

    Rows that share a text stay on one side; rows are stratified by their rarest label. A group of rows with
    different labels goes with the first of them.

    Raises:
        DataError: A class has fewer different texts than there are parts, or the shares leave nothing to train on.
    """
    if sum(shares.values()) >= 1:
        told = " + ".join(f"{share:g}" for share in shares.values())
        held = " and ".join(f"data.{name}" for name in shares)
        raise DataError(f"{held} take {told} of the rows of data.train", hint="Leave some for training.")
    _, first, group, size = np.unique(rows.groups(), return_index=True, return_inverse=True, return_counts=True)
    classes = rows.classes(task)
    texts_of = {int(index): np.flatnonzero(classes[first] == index) for index in np.unique(classes)}
    if task.in_every_part and shares:
        few = {index: len(texts) for index, texts in texts_of.items() if index >= 0 and len(texts) <= len(shares)}
        _check_enough({rows.name(task, index): count for index, count in few.items()}, shares, len(texts_of))
    random = np.random.default_rng([seed, 1])
    part_of = np.zeros(len(first), dtype=np.int64)
    for texts in texts_of.values():
        shuffled = random.permutation(texts)
        part_of[shuffled] = _deal(size[shuffled], list(shares.values()))
    if not task.in_every_part:
        _give_back(part_of, group, rows, task)
    order = random.permutation(len(group))
    named = enumerate(("train", *shares))
    found = {name: order[part_of[group][order] == part] for part, name in named}
    if empty := [name for name in shares if not len(found[name])]:
        raise DataError(
            f"data.{empty[0]} gets no row: {len(rows.labels)} rows hang together by equal texts in {len(first)} groups",
            hint=f"Add rows, or use a file for data.{empty[0]}, or null.",
        )
    return found


def _give_back(part_of: np.ndarray, group: np.ndarray, rows: Keys, task: Task) -> None:
    """Put the first row with a class that no row of train has into train, with its group.

    Rows with several labels need it: a class that is never a row's rarest is not dealt out by itself.
    """
    class_of = {label: task.class_of(label) for label in {label for own in rows.labels for label in own}}
    lacking = set(class_of.values())
    for own, part in zip(rows.labels, part_of[group], strict=True):
        if part == 0:
            lacking.difference_update(class_of[label] for label in own)
    for row, own in enumerate(rows.labels):
        if not lacking.isdisjoint(class_of[label] for label in own):
            part_of[group[row]] = 0
            lacking.difference_update(class_of[label] for label in own)


def _deal(sizes: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """The part of each text of a class, given how many rows it has: 0 for train, else 1 + the place of its share.

    A text with more rows than a part is to have is passed over, unless there is nothing else to take.
    """
    part_of = np.zeros(len(sizes), dtype=np.int64)
    for part, share in enumerate(shares, start=1):
        wanted = max(1, round(share * sizes.sum()))
        free = np.flatnonzero(part_of == 0)
        free = free[np.argsort(sizes[free] > wanted, kind="stable")]
        reached = int(np.searchsorted(np.cumsum(sizes[free]), wanted)) + 1
        needed_later = len(shares) - part + 1  # a text for each later part and for train
        part_of[free[: min(reached, len(free) - needed_later)]] = part
    return part_of


def _check_enough(few: Mapping[str, int], shares: Mapping[str, float], classes: int) -> None:
    """Raise a DataError where some of the classes have too `few` different texts to stand in every part."""
    if not few:
        return
    least = len(shares) + 1
    told = [f"{label!r} has {count}" for label, count in itertools.islice(few.items(), _TOLD)]
    if len(few) > _TOLD:
        told.append(f"{len(few) - _TOLD} more classes have too few")
    parts = ", ".join(("train", *shares))
    raise DataError(
        f"too few different texts: {', '.join(told)}; a class needs at least {least}, to stand in {parts}",
        hint=f"{math.ceil(1 / min(shares.values()))} or more of each keep the shares. Add rows, or hold out less: "
        + " or ".join(f"data.{name}=null" for name in shares)
        + ("." if len(few) < classes else ". Is this the label column? It is mapped with data.columns.label=NAME."),
    )


def nested(keys: Keys, task: Task, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An order of rows whose beginnings are stratified by class, and where each row's group of equal texts ends.

    Returns:
        (N,) positions, and (N,) how many rows there are up to the end of each one's group.
    """
    _, first, group, size = np.unique(keys.groups(), return_index=True, return_inverse=True, return_counts=True)
    classes = keys.classes(task)[first]
    random = np.random.default_rng([seed, 3])
    place = np.empty(len(first))
    for index in np.unique(classes):
        own = random.permutation(np.flatnonzero(classes == index))
        place[own] = (np.arange(len(own)) + random.random()) / len(own)
        if index >= 0:
            place[own[0]] -= 1.0  # every class from the beginning on
    rank = np.empty(len(first), dtype=np.int64)
    ordered = np.argsort(place, kind="stable")
    rank[ordered] = np.arange(len(ordered))
    return np.argsort(rank[group], kind="stable"), np.repeat(np.cumsum(size[ordered]), size[ordered])
