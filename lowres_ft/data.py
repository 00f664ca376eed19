"""Rows on disk and their splits.

A source is read once into an Arrow file with each row's example, where it stands, the hashes of its texts and its
labels; everything after works on that file, memory-mapped, so a source may be larger than memory.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lowres_ft import arrow, assets, clean, readers
from lowres_ft.errors import DataError, nearest
from lowres_ft.files import writing
from lowres_ft.parts import DataSpec
from lowres_ft.recipe import Recipe
from lowres_ft.splits import Keys, split
from lowres_ft.tasks.base import Example, Form, Ragged, Seen, Task

_BATCH = 4096  # rows that stand in memory at a time
_CHOSEN_BY = ("validation", "test")  # validation chooses the best step, which test scores
_PROBLEMS = 10  # problems with rows that are told at the most
_SCHEMA = pa.schema(
    [
        ("where", pa.string()),
        ("keys", pa.list_(pa.uint64())),
        ("labels", pa.list_(pa.string())),
        ("hash", pa.uint64()),
        ("example", pa.string()),
    ]
)


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

    def keys(self) -> Ragged:
        """Hashes (uint64) of the texts of each row by which it is the same as another."""
        return arrow.ragged(self.table["keys"]).take(self.index)

    @cached_property
    def labels(self) -> list[tuple[str, ...]]:
        """(N,) the labels of each row as they stand in the source; equal ones are one object."""
        column = self.table["labels"].combine_chunks()
        encoded = column.flatten().dictionary_encode()
        names: list[str] = encoded.dictionary.to_pylist()
        codes = Ragged(arrow.numbers(encoded.indices), arrow.starts(column))
        known: dict[bytes, tuple[str, ...]] = {}
        found = []
        for row in self.index:
            own = codes[row]
            if (labels := known.get(own.tobytes())) is None:
                labels = known[own.tobytes()] = tuple(names[code] for code in own)
            found.append(labels)
        return found

    def examples(self, task: Task) -> Iterator[Any]:
        """The rows as examples of a task.

        They are picked one by one: `Table.take` would copy whole columns, and fails on more than 2 GiB of text.
        """
        both = [self.table[name].chunks for name in ("where", "example")]
        starts = np.cumsum([0, *(len(chunk) for chunk in both[0])])
        chunk_of = np.searchsorted(starts, self.index, side="right") - 1
        for chunk, place in zip(chunk_of.tolist(), (self.index - starts[chunk_of]).tolist(), strict=True):
            where, example = (chunks[chunk][place].as_py() for chunks in both)
            yield task.example(where, **json.loads(example))

    def fingerprint(self) -> str:
        """A hash of the rows in their order."""
        return hashlib.sha256(self.hashes().astype("<u8").tobytes()).hexdigest()

    def hashes(self) -> np.ndarray:
        """(N,) uint64 hashes of all that the task reads of a row."""
        hashes: np.ndarray = arrow.numbers(self.table["hash"])[self.index]
        return hashes


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

    def before(self, name: str) -> list[Rows]:
        """The splits that have a say in the model before a held-out one is scored."""
        return [rows for other, rows in self.splits().items() if other == "train" or (other, name) == _CHOSEN_BY]

    def fingerprint(self) -> dict[str, str]:
        """A hash of each split."""
        return {name: rows.fingerprint() for name, rows in self.splits().items()}


def apart(held: Rows, *others: Rows) -> np.ndarray:
    """Positions in `held` of the rows that share no text with the others."""
    keys = held.keys()
    shared = np.isin(keys.values, np.concatenate([rows.keys().values for rows in others]))
    return np.setdiff1d(np.arange(len(held)), keys.row_of[shared])


def load(recipe: Recipe, workspace: Path, progress: assets.Progress | None = None) -> Data:
    """Read the sources of a recipe into `workspace` and split them.

    Raises:
        DataError: A file or row is wrong, a label unknown, or there are too few rows; file and line are named.
        AssetError: A starter cannot be fetched.
    """
    spec = recipe.data
    rows, seen = store(spec.train, recipe.task, spec.columns, workspace / "train.arrow", progress, cleaners=spec.clean)
    task = recipe.task.resolve(seen)
    notes: list[str] = []
    rows = _once(rows, spec, "train", notes)
    held: dict[str, Rows] = {}
    shares: dict[str, float] = {}
    for name, source in {"validation": spec.validation, "test": spec.test}.items():
        if isinstance(source, str):
            path = workspace / f"{name}.arrow"
            held[name], seen = store(source, task, spec.columns, path, progress, cleaners=spec.clean)
            task.check(seen)
            held[name] = _once(held[name], spec, name, notes)
        elif source is not None:
            shares[name] = source
    taken = split(Keys(rows.keys(), rows.labels), task, shares, recipe.train.seed)
    held |= {name: rows.take(taken[name]) for name in shares}
    train = rows.take(taken["train"][: spec.limit])
    _require_classes(task, rows, train, spec)
    task = task.weigh(train.examples(task))
    data = Data(task, train, held.get("validation"), held.get("test"))
    whole = {"train": rows} | {name: found for name, found in held.items() if name not in shares}
    notes += [f"{name}: {note}" for name, found in whole.items() for note in task.notes(found.examples(task))]
    return replace(data, notes=(*notes, *_overlaps(data, spec)))


def _once(rows: Rows, spec: DataSpec, name: str, notes: list[str]) -> Rows:
    """The rows as they are, or where the recipe asks for it the first of those that are equal."""
    if not spec.distinct:
        return rows
    _, first = np.unique(rows.hashes(), return_index=True)
    if repeats := len(rows) - len(first):
        notes.append(f"{repeats:,} of {len(rows):,} rows of {name} repeat an earlier one and are left out")
    return rows.take(np.sort(first))


def _require_classes(task: Task, rows: Rows, train: Rows, spec: DataSpec) -> None:
    """Raise a DataError where a label stands in the rows, but in none that is trained on."""
    lost = _classes(task, rows) - _classes(task, train)
    if lost and spec.limit is not None:
        hint = "Raise it, or leave it out."
        raise DataError(f"data.limit={spec.limit} leaves {len(lost)} of the classes without a row", hint=hint)
    if lost:  # where a task lets labels be rarer than there are splits
        raise DataError(
            f"the split leaves {len(lost)} of the classes without a row to train on",
            hint="Hold out less (data.validation, data.test), or take another train.seed.",
        )


def _classes(task: Task, rows: Rows) -> set[int]:
    """The classes that rows have."""
    return {task.class_of(label) for label in {label for labels in rows.labels for label in labels}}


def _overlaps(data: Data, spec: DataSpec) -> Iterator[str]:
    for name, source in {"validation": spec.validation, "test": spec.test}.items():
        if isinstance(source, str):
            held = data.splits()[name]
            both = len(held) - len(apart(held, *data.before(name)))
            if both:
                yield f"{both} of {len(held)} {name} texts stand in train too; scored with and without"


def store(
    source: str,
    task: Task,
    columns: Mapping[str, str],
    path: Path,
    progress: assets.Progress | None = None,
    *,
    cleaners: Sequence[str] = (),
) -> tuple[Rows, dict[str, Seen]]:
    """Read a source into an Arrow file at `path`, cleaned; return its rows and the labels that stand in it."""
    seen: dict[str, Seen] = {}
    wrong: list[DataError] = []
    pending: list[dict[str, Any]] = []
    with writing(path), pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        for where, row in readers.rows(source, progress):
            try:
                example = clean.cleaned(task, task.read(by_role(row, where, task.forms, columns), where), cleaners)
            except MissingColumnError:
                raise
            except DataError as error:
                wrong.append(error)
                if len(wrong) == _PROBLEMS:
                    break
                continue
            pending.append(_record(task, example))
            _count(seen, pending[-1]["labels"], where)
            if len(pending) == _BATCH:
                writer.write_batch(arrow.batch(pending, _SCHEMA))
                pending.clear()
        writer.write_batch(arrow.batch(pending, _SCHEMA))
    if wrong:
        raise DataError("\n  ".join(error.message for error in wrong), hint=wrong[0].hint or "Mend or remove the rows.")
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    return Rows(table, np.arange(table.num_rows)), seen


def _record(task: Task, example: Example) -> dict[str, Any]:
    """An example as it lies in the Arrow file."""
    content = {field.name: getattr(example, field.name) for field in fields(example) if field.name != "where"}
    # What an example does not have is left out, so that a field more does not change what is known of older rows.
    text = json.dumps({name: value for name, value in content.items() if value is not None}, ensure_ascii=False)
    return {
        "where": example.where,
        "keys": [key(text) for text in task.keys(example)],
        "labels": list(task.labels_in(example)),
        "hash": key(text),
        "example": text,
    }


def _count(seen: dict[str, Seen], labels: list[str], where: str, most: int = 2000) -> None:
    """Count labels; a column of free text is not a label column, and is not counted to its end."""
    for label in labels:
        if before := seen.get(label):
            seen[label] = Seen(before.count + 1, before.where)
        elif len(seen) < most:
            seen[label] = Seen(1, where)


class MissingColumnError(DataError):
    """A row lacks a column, and so most likely do all others."""


def by_role(
    row: Mapping[str, Any], where: str, forms: tuple[Form, ...], columns: Mapping[str, str], *, labelled: bool = True
) -> dict[str, Any]:
    """Name the values of a row by the roles that their columns play, in the first of the forms that the row fits.

    Where columns are mapped, only the forms that have all those roles are meant, if there are any.

    Raises:
        MissingColumnError: The row fits none.
        DataError: A value cannot be written as UTF-8.
    """
    forms = tuple(form for form in forms if columns.keys() <= set(form.roles)) or forms
    lacks = {form: _lacking(form, row, columns, labelled=labelled) for form in forms}
    nearly = min(forms, key=lambda form: len(lacks[form]) / len((*form.given, *(form.wanted if labelled else ()))))
    if lacks[nearly]:
        raise _missing(nearly, lacks[nearly], row, where, forms, columns)
    form = next(form for form in forms if not lacks[form])
    values = {}
    for role in form.roles:
        name = columns.get(role, role)
        if name in row:
            values[role] = row[name]
            if not _whole(row[name]):
                raise DataError(
                    f"{where}: the {role} holds half a character (a lone surrogate)", hint="Mend or remove it."
                )
    return values if labelled else {role: value for role, value in values.items() if role not in form.wanted}


def _lacking(form: Form, row: Mapping[str, Any], columns: Mapping[str, str], *, labelled: bool) -> list[str]:
    """Roles whose columns the row does not have; an optional one that is mapped must be there."""
    needed = [*form.given, *(form.wanted if labelled else ()), *(role for role in form.optional if role in columns)]
    return [role for role in needed if columns.get(role, role) not in row]


def _missing(
    form: Form,
    lacking: list[str],
    row: Mapping[str, Any],
    where: str,
    forms: tuple[Form, ...],
    columns: Mapping[str, str],
) -> MissingColumnError:
    role = lacking[0]
    name = columns.get(role, role)
    hint = f"Say which column holds the {role}: data.columns.{role}=NAME."
    if len(forms) > 1:
        ways = "; or ".join(" and ".join(_first((*form.given, *form.wanted))) for form in forms)
        hint = f"What is read is {ways}. A column of another name is mapped with data.columns.{role}=NAME."
    return MissingColumnError(
        f"{where}: no column '{name}'{nearest(name, row)}; there are {', '.join(map(repr, row))}",
        hint=f"{hint} {form.hint}".strip(),
    )


def _first(roles: tuple[str, ...], most: int = 6) -> tuple[str, ...]:
    """The roles as they are told: a task may have one for each of many labels."""
    return roles if len(roles) <= most else (*roles[:most], f"{len(roles) - most} more")


def _whole(value: Any) -> bool:
    """Whether all text in a JSON value can be written as UTF-8."""
    if not isinstance(value, str):
        return not isinstance(value, list | dict) or _whole(json.dumps(value, ensure_ascii=False, default=str))
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def key(text: str) -> int:
    """64-bit hash of a text. Equal texts have equal keys."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
