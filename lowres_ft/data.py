"""Rows on disk and their splits.

A source is read once into an Arrow file with the columns that the task reads, where each row stands, and a hash of
its text; everything after works on that file, memory-mapped, so a source may be larger than memory.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lowres_ft import assets, readers
from lowres_ft.errors import DataError, nearest
from lowres_ft.files import writing
from lowres_ft.recipe import DataSpec, Recipe
from lowres_ft.tasks.base import Example, Seen, Task

_BATCH = 4096  # rows that stand in memory at a time
_TYPES = {"string": pa.string()}
_PROBLEMS = 10  # problems with rows that are told at the most


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of an Arrow file, in an order of their own."""

    table: pa.Table
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def take(self, index: np.ndarray) -> "Rows":
        """The rows at these positions of this selection."""
        return Rows(self.table, self.index[index])

    def keys(self) -> np.ndarray:
        """(N,) uint64 hashes of the texts."""
        keys: np.ndarray = self.table["key"].to_numpy()[self.index]
        return keys

    def labels(self) -> list[str]:
        """(N,) labels as they stand in the source; equal ones are one object."""
        encoded = self.table["label"].dictionary_encode().combine_chunks()
        names: list[str] = encoded.dictionary.to_pylist()
        return [names[code] for code in encoded.indices.to_numpy()[self.index]]

    def examples(self, task: Task) -> Iterator[Example]:
        """The rows as examples of a task.

        They are picked one by one: `Table.take` would copy whole columns, and fails on more than 2 GiB of text.
        """
        columns = {name: self.table[name].chunks for name in self.table.column_names if name != "key"}
        starts = np.cumsum([0, *(len(chunk) for chunk in columns["where"])])
        chunk_of = np.searchsorted(starts, self.index, side="right") - 1
        for chunk, place in zip(chunk_of.tolist(), (self.index - starts[chunk_of]).tolist(), strict=True):
            row = {name: chunks[chunk][place].as_py() for name, chunks in columns.items()}
            yield task.read(row, row["where"])

    def fingerprint(self) -> str:
        """A hash of the texts and labels in their order."""
        digest = hashlib.sha256(self.keys().astype("<u8").tobytes())
        for label in self.labels():
            digest.update(f"{len(label)}:{label}".encode())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Data:
    """The splits of an experiment, and the task with its labels known."""

    task: Task
    train: Rows
    validation: Rows | None
    test: Rows | None
    notes: tuple[str, ...] = ()

    def splits(self) -> dict[str, Rows]:
        """The splits that there are, by name."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: rows for name, rows in found.items() if rows is not None}

    def fingerprint(self) -> dict[str, str]:
        """A hash of each split."""
        return {name: rows.fingerprint() for name, rows in self.splits().items()}

    def apart(self, split: str) -> np.ndarray:
        """Positions in a split of the rows whose text does not stand in train."""
        return np.flatnonzero(~np.isin(self.splits()[split].keys(), self.train.keys()))


def load(recipe: Recipe, workspace: Path, progress: assets.Progress | None = None) -> Data:
    """Read the sources of a recipe into `workspace` and split them.

    Raises:
        DataError: A file or row is wrong, a label unknown, or there are too few rows; file and line are named.
        AssetError: A starter cannot be fetched.
    """
    spec = recipe.data
    rows, seen = store(spec.train, recipe.task, spec.columns, workspace / "train.arrow", progress)
    task = recipe.task.resolve(seen)
    held: dict[str, Rows] = {}
    shares: dict[str, float] = {}
    for name, source in {"validation": spec.validation, "test": spec.test}.items():
        if isinstance(source, str):
            held[name], seen = store(source, task, spec.columns, workspace / f"{name}.arrow", progress)
            task.check(seen)
        elif source is not None:
            shares[name] = source
    taken = split(rows, task, shares, recipe.train.seed)
    held |= {name: rows.take(taken[name]) for name in shares}
    train = rows.take(taken["train"][: spec.limit])
    if lost := _classes(task, rows) - _classes(task, train):
        raise DataError(
            f"data.limit={spec.limit} leaves {len(lost)} of the classes without a row",
            hint="Raise it, or leave it out.",
        )
    data = Data(task, train, held.get("validation"), held.get("test"))
    return replace(data, notes=tuple(_overlaps(data, spec)))


def _classes(task: Task, rows: Rows) -> set[int]:
    """The classes that rows have."""
    return {task.class_of(label) for label in set(rows.labels())}


def _overlaps(data: Data, spec: DataSpec) -> Iterator[str]:
    for name, source in {"validation": spec.validation, "test": spec.test}.items():
        if isinstance(source, str):
            both = len(data.splits()[name]) - len(data.apart(name))
            if both:
                yield f"{both} of {len(data.splits()[name])} {name} texts stand in train too; scored with and without"


def store(
    source: str, task: Task, columns: Mapping[str, str], path: Path, progress: assets.Progress | None = None
) -> tuple[Rows, dict[str, Seen]]:
    """Read a source into an Arrow file at `path`; return its rows and the labels that stand in it."""
    roles = task.columns
    schema = pa.schema(
        [("where", pa.string()), ("key", pa.uint64()), *((role, _TYPES[kind]) for role, kind in roles.items())]
    )
    seen: dict[str, Seen] = {}
    wrong: list[DataError] = []
    pending: list[dict[str, Any]] = []
    with writing(path), pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for where, row in readers.rows(source, progress):
            values = by_role(row, where, roles, columns)
            try:
                example = task.read(values, where)
                pending.append({"where": where, "key": key(example), "text": example.text, "label": example.label})
            except DataError as error:
                wrong.append(error)
                if len(wrong) == _PROBLEMS:
                    break
                continue
            _count(seen, example)
            if len(pending) == _BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(pending, schema))
                pending.clear()
        writer.write_batch(pa.RecordBatch.from_pylist(pending, schema))
    if wrong:
        raise DataError("\n  ".join(error.message for error in wrong), hint=wrong[0].hint or "Mend or remove the rows.")
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    return Rows(table, np.arange(table.num_rows)), seen


def _count(seen: dict[str, Seen], example: Example, most: int = 2000) -> None:
    """Count a label; a column of free text is not a label column, and is not counted to its end."""
    label = example.label or ""
    if before := seen.get(label):
        seen[label] = Seen(before.count + 1, before.where)
    elif len(seen) < most:
        seen[label] = Seen(1, example.where)


def by_role(row: Mapping[str, Any], where: str, roles: Mapping[str, str], columns: Mapping[str, str]) -> dict[str, Any]:
    """Name the values of a row by the roles that their columns play.

    Raises:
        DataError: The row lacks a column, or a value cannot be written as UTF-8.
    """
    values = {}
    for role in roles:
        name = columns.get(role, role)
        if name not in row:
            raise DataError(
                f"{where}: no column '{name}'{nearest(name, row)}; there are {', '.join(map(repr, row))}",
                hint=f"Say which column holds the {role}: data.columns.{role}=NAME.",
            )
        values[role] = row[name]
        if isinstance(row[name], str) and not _whole(row[name]):
            raise DataError(f"{where}: the {role} holds half a character (a lone surrogate)", hint="Mend or remove it.")
    return values


def _whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def key(example: Example) -> int:
    """64-bit hash of the text. Equal texts have equal keys."""
    return int.from_bytes(hashlib.blake2b(example.text.encode(), digest_size=8).digest(), "little")


def split(rows: Rows, task: Task, shares: Mapping[str, float], seed: int) -> dict[str, np.ndarray]:
    """Seeded, stratified parts of rows: positions by name, and what is left as 'train', each in a shuffled order.

    Equal texts stay on one side; each part gets at least one text of each class. A text whose rows have
    different labels goes with the first of them.

    Raises:
        DataError: A class has fewer different texts than there are parts, or the shares leave nothing to train on.
    """
    if sum(shares.values()) >= 1:
        told = " + ".join(f"{share:g}" for share in shares.values())
        held = " and ".join(f"data.{name}" for name in shares)
        raise DataError(f"{held} take {told} of the rows of data.train", hint="Leave some for training.")
    _, first, group, size = np.unique(rows.keys(), return_index=True, return_inverse=True, return_counts=True)
    labels = rows.labels()
    class_of = {label: task.class_of(label) for label in set(labels)}
    classes = np.array([class_of[label] for label in labels])
    texts_of = {index: np.flatnonzero(classes[first] == index) for index in sorted(set(class_of.values()))}
    names = {index: label for label, index in sorted(class_of.items(), reverse=True)}
    _check_enough({names[index]: len(texts) for index, texts in texts_of.items()}, shares)
    random = np.random.default_rng([seed, 1])
    part_of = np.zeros(len(first), dtype=np.int64)
    for texts in texts_of.values():
        shuffled = random.permutation(texts)
        part_of[shuffled] = _deal(size[shuffled], list(shares.values()))
    order = random.permutation(len(group))
    named = enumerate(("train", *shares))
    return {name: order[part_of[group][order] == part] for part, name in named}


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


def _check_enough(texts: Mapping[str, int], shares: Mapping[str, float]) -> None:
    """Raise a DataError where a class has too few different texts to stand in every part."""
    least = len(shares) + 1
    few = {label: count for label, count in texts.items() if count < least}
    if not few:
        return
    told = [f"{label!r} has {count}" for label, count in itertools.islice(few.items(), _PROBLEMS)]
    if len(few) > _PROBLEMS:
        told.append(f"{len(few) - _PROBLEMS} more classes have too few")
    parts = ", ".join(("train", *shares))
    raise DataError(
        f"too few different texts: {', '.join(told)}; a class needs at least {least}, to stand in {parts}",
        hint=f"{math.ceil(1 / min(shares.values()))} or more of each keep the shares. Add rows, or hold out less: "
        + " or ".join(f"data.{name}=null" for name in shares)
        + ("." if len(few) < len(texts) else ". Is this the label column? It is mapped with data.columns.label=NAME."),
    )
