"""The rows of an experiment as checks see them: some figures of every row, and bounded samples of the rows."""

import itertools
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from lowres_ft import data
from lowres_ft.checks import _marks
from lowres_ft.checks.base import Finding, Severity
from lowres_ft.data import Data, Rows
from lowres_ft.tasks import _tags
from lowres_ft.tasks.base import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOLD = 10  # rows that a finding names at the most
_CHARACTERS = 50_000_000  # of a sample
_SEED = 20_091  # of samples alone
ALL = "all"
"""The split of a finding whose rows are of several."""


def texts(example: Example) -> list[str]:
    """What a row says: its text, both texts of a pair, or what is said in a conversation."""
    if messages := getattr(example, "messages", None):
        return [message["content"] for message in messages]
    text: str = getattr(example, "text", "")
    pair = getattr(example, "pair", None)
    return [text] if pair is None else [text, pair]


def normal(text: str) -> str:
    """A text without what makes no other text of it: capitals, white space, forms of a character."""
    whole = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return " ".join(whole.casefold().split())


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of a split, and figures of each."""

    name: str
    task: Task
    rows: Rows
    characters: np.ndarray
    """(N,) int64 of all texts of a row."""
    keys: np.ndarray
    """(N,) uint64 hashes of the texts without capitals and white space."""
    answers: np.ndarray
    """(N,) uint64 hashes of the labels or tags; 0 where a row has none."""
    marks: np.ndarray
    """(N,) uint16 a bit for each kind of damage, by its place in `_marks.KINDS`."""

    @classmethod
    def of(cls, name: str, task: Task, rows: Rows) -> Self:
        """Look at every row once."""
        characters, marks = np.empty(len(rows), dtype=np.int64), np.empty(len(rows), dtype=np.uint16)
        keys, answers = np.empty(len(rows), dtype=np.uint64), np.empty(len(rows), dtype=np.uint64)
        for row, example in enumerate(rows.examples(task)):
            said = texts(example)
            characters[row] = sum(map(len, said))
            keys[row] = data.key("\n".join(map(normal, said)))
            answers[row] = _answer(task, example)
            marks[row] = _marks.marks(said)
        return cls(name, task, rows, characters, keys, answers, marks)

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, most: int) -> np.ndarray:
        """Positions of at most `most` rows, in order: a seeded draw where there are more."""
        if len(self) <= most and self.characters.sum() <= _CHARACTERS:
            return np.arange(len(self))
        drawn = np.random.default_rng(_SEED).permutation(len(self))[:most]
        fits = np.cumsum(self.characters[drawn]) <= _CHARACTERS
        return np.sort(drawn[: max(1, int(fits.sum()))])

    def examples(self, positions: np.ndarray) -> Iterator[Any]:
        """Some of the rows as the task's examples."""
        return self.rows.take(positions).examples(self.task)

    def where(self, positions: Collection[int] | np.ndarray, most: int = _TOLD) -> tuple[str, ...]:
        """File and line of the first of some rows, in the order given."""
        column = self.rows.table["where"]
        return tuple(column[int(self.rows.index[row])].as_py() for row in itertools.islice(positions, most))

    def first(self, positions: np.ndarray) -> np.ndarray:
        """Positions in the order of the file, which a split shuffles."""
        return positions[np.argsort(self.rows.index[positions], kind="stable")]

    def finding(
        self,
        kind: str,
        severity: Severity,
        positions: np.ndarray,
        message: str,
        hint: str,
        *,
        of: int | None = None,
        ranked: bool = False,
    ) -> Finding:
        """A finding about the rows at some positions; `of` rows were looked at, all where nothing is said."""
        looked = len(self) if of is None else of
        return Finding(
            kind=kind,
            severity=severity,
            split=self.name,
            count=len(positions),
            of=looked,
            sampled=looked < len(self),
            rows=self.where(positions if ranked else self.first(positions)),
            message=message,
            hint=hint,
        )


@dataclass(frozen=True, eq=False)
class Survey:
    """All that checks look at."""

    task: Task
    parts: dict[str, Part]
    tokenizer: "PreTrainedTokenizerBase | None" = None
    """The base's, ready for the task; None where lengths are not to be told."""
    most: int | None = None
    """Rows of a split that a check may sample, where it would sample more."""

    @classmethod
    def of(
        cls,
        rows: Data,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        *,
        first: int | None = None,
        most: int | None = None,
    ) -> "Survey":
        """Look once at every row of every split, or at the `first` ones; samples have `most` rows at the most."""
        parts = {name: Part.of(name, rows.task, _first(split, first)) for name, split in rows.splits().items()}
        return cls(rows.task, parts, tokenizer, most)

    @property
    def train(self) -> Part:
        """The rows that are trained on."""
        return self.parts["train"]

    @property
    def held(self) -> list[Part]:
        """The splits that are held out."""
        return [part for name, part in self.parts.items() if name != "train"]

    @property
    def has_classes(self) -> bool:
        """Whether each row as a whole has labels."""
        return self.task.kind == "classification"


def _first(rows: Rows, most: int | None) -> Rows:
    return rows if most is None or len(rows) <= most else rows.take(np.arange(most))


def _answer(task: Task, example: Any) -> int:
    """A hash of what is to be predicted of a row; of a conversation, whose answers are its text, nothing."""
    if (tags := getattr(example, "tags", None)) is not None:
        return data.key(" ".join(_tags.to_bio(tags)))
    labels = task.labels_in(example)
    return _hashed(tuple(sorted(map(task.class_of, labels)))) if labels else 0


@lru_cache(maxsize=4096)
def _hashed(classes: tuple[int, ...]) -> int:
    return data.key(",".join(map(str, classes)))


def shown(text: str, most: int = 60) -> str:
    """A text as a message quotes it."""
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= most else f"{flat[: most - 4]} ...")


def groups(keys: np.ndarray) -> list[np.ndarray]:
    """Positions of each group of equal keys with more than one row, largest first."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.r_[True, keys[order][1:] != keys[order][:-1]])
    sizes = np.diff(np.r_[starts, len(order)])
    several = np.flatnonzero(sizes > 1)
    found = [order[starts[one] : starts[one] + sizes[one]] for one in several]
    return sorted(found, key=lambda part: (-len(part), part[0]))
