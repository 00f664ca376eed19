"""Steps from data and seed; micro-batches from a plan.

Which examples make up a step follows from the data and the seed alone. How a step is cut into micro-batches is the
plan's business and changes nothing but rounding.
"""

import itertools
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch

from lowres_ft.errors import DataError
from lowres_ft.files import writing
from lowres_ft.model import Adapted
from lowres_ft.tasks.base import IGNORED, Batch, Encoded, Ragged, Task, supervised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lowres_ft.data import Rows

_WINDOW = 16  # batches that are sorted by length together, so that little of a batch is padding
_AT_ONCE = 1024  # texts that pass the tokenizer together
_TOLD = 10  # rows that are named at the most


@dataclass(frozen=True, eq=False)
class Tokens:
    """A tokenized split: flat ids and targets on disk, where each sequence begins, and which ones a row has."""

    ids: np.ndarray
    """(all tokens,) int32."""
    starts: np.ndarray
    """(N + 1,) int64 offsets into ids."""
    targets: np.ndarray
    """(all targets,) int32, or float32 where they are floats."""
    target_starts: np.ndarray
    """(N + 1,) int64 offsets into targets."""
    firsts: np.ndarray
    """(R + 1,) int64 the first sequence of each row."""
    rows: "Rows | None" = None
    """The rows that the sequences are of; None for texts that came without a file."""
    left_out: tuple[str, ...] = ()
    """File and line of the examples that the task left out."""
    segments: np.ndarray | None = None
    """(all tokens,) uint8 which of two texts each token is of; None where there is but one."""

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.firsts) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of each sequence."""
        return np.diff(self.starts)

    @cached_property
    def row_lengths(self) -> np.ndarray:
        """(R,) tokens of each row."""
        return np.diff(self.starts[self.firsts])

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """Positions of the sequences of some rows."""
        return np.concatenate([np.arange(self.firsts[row], self.firsts[row + 1]) for row in rows])

    @property
    def truth(self) -> Ragged:
        """The targets of the items of each row."""
        items = supervised(self.targets)
        before = np.concatenate([[0], np.cumsum(items)])
        wide = np.int64 if self.targets.dtype.kind == "i" else np.float64
        return Ragged(np.asarray(self.targets[items], dtype=wide), before[self.target_starts[self.firsts]])

    def sequence(self, position: int) -> np.ndarray:
        """Token ids of one sequence."""
        return self.ids[self.starts[position] : self.starts[position + 1]]

    def target(self, position: int) -> np.ndarray:
        """Targets of one sequence."""
        return self.targets[self.target_starts[position] : self.target_starts[position + 1]]

    def where(self, positions: np.ndarray) -> list[str]:
        """File and line of the rows of these sequences."""
        rows = np.unique(np.searchsorted(self.firsts, positions, side="right") - 1)
        if self.rows is None:
            return [f"text {row + 1}" for row in rows]
        return [str(where) for where in self.rows.table["where"].take(self.rows.index[rows]).to_pylist()]


class Tokenizing(Protocol):
    """What reads rows, such as an adapted model."""

    @property
    def task(self) -> Task: ...

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase": ...


class Reader(NamedTuple):
    """What reads rows before a model is loaded."""

    task: Task
    tokenizer: "PreTrainedTokenizerBase"


def tokenize(reader: Tokenizing, rows: "Rows", path: Path) -> Tokens:
    """Tokenize a split into files at `path` (.ids, .targets and .segments), which are then memory-mapped.

    Raises:
        DataError: An example cannot be trained on, or the task left all of them out.
    """
    files = [path.with_suffix(ending) for ending in (".ids", ".targets", ".segments")]
    counts: list[list[int]] = [[0], [0], [0]]
    codes = _codes(None)
    sequences: list[int] = []
    left_out: list[str] = []
    with writing(path), ExitStack() as stack:
        sinks = [stack.enter_context(open(file, "wb")) for file in files]
        examples = rows.examples(reader.task)
        while part := [example for _, example in zip(range(_AT_ONCE), examples, strict=False)]:
            for example, row in zip(part, reader.task.encode(reader.tokenizer, part), strict=True):
                codes = _codes(row[0]) if row and not any(sequences) else codes
                sequences.append(len(row))
                left_out += [] if row else [example.where]
                for encoded in row:
                    for sink, values, code, count in zip(sinks, _parts(encoded), codes, counts, strict=True):
                        sink.write(array(code, values).tobytes())
                        count.append(len(values))
    if not any(sequences):
        raise _none_left(left_out[0])
    kept = np.flatnonzero(sequences)
    starts = [np.cumsum(count, dtype=np.int64) for count in counts]
    flat = [np.memmap(file, dtype=code, mode="r") for file, code in zip(files[:2], codes, strict=False)]
    segments = np.memmap(files[2], dtype=np.uint8, mode="r") if starts[2][-1] else None
    firsts = np.cumsum([0, *(sequences[row] for row in kept)], dtype=np.int64)
    return Tokens(flat[0], starts[0], flat[1], starts[1], firsts, rows.take(kept), tuple(left_out), segments)


def _none_left(first: str) -> DataError:
    return DataError(f"no row can be used; all were left out, such as {first}")


def sample(reader: Tokenizing, rows: "Rows", most: int, seed: int) -> Tokens:
    """At most so many rows of a split, tokenized in memory: how long the others are, too.

    Raises:
        DataError: None of them can be trained on.
    """
    drawn = np.random.default_rng([seed, 4]).permutation(len(rows))[:most]
    examples = list(rows.take(np.sort(drawn)).examples(reader.task))
    encoded = [row for row in reader.task.encode(reader.tokenizer, examples) if row]
    if not encoded:
        raise _none_left(examples[0].where)
    return in_memory(encoded)


def chosen(tokens: Tokens, rows: np.ndarray) -> Tokens:
    """The tokens of some rows, in memory, as if those had been tokenized alone."""
    positions = tokens.of_rows(rows)
    ids, targets = (
        Ragged(values, starts).take(positions)
        for values, starts in ((tokens.ids, tokens.starts), (tokens.targets, tokens.target_starts))
    )
    segments = None if tokens.segments is None else Ragged(tokens.segments, tokens.starts).take(positions).values
    firsts = np.cumsum([0, *np.diff(tokens.firsts)[rows]], dtype=np.int64)
    own = None if tokens.rows is None else tokens.rows.take(rows)
    return Tokens(ids.values, ids.starts, targets.values, targets.starts, firsts, own, (), segments)


def _parts(encoded: Encoded) -> tuple[Sequence[int], Sequence[float], Sequence[int]]:
    """What is stored of a sequence."""
    return encoded.ids, encoded.targets, encoded.segments or ()


def _codes(first: Encoded | None) -> str:
    """As what ids, targets and segments are stored, given the first sequence: int32, int32 or float32, and uint8.

    An `array` of integers refuses a float, where numpy would cut it off.
    """
    return "ifB" if first is not None and isinstance(first.targets[0], float) else "iiB"


def told(name: str, tokens: Tokens) -> str:
    """A sentence that names the rows of a split that the task left out."""
    rows = ", ".join(tokens.left_out[:_TOLD])
    more = f" and {len(tokens.left_out) - _TOLD} more" if len(tokens.left_out) > _TOLD else ""
    return f"{len(tokens.left_out)} rows of {name} are left out: {rows}{more}"


def in_memory(encoded: Sequence[Sequence[Encoded]]) -> Tokens:
    """A few rows that were encoded already."""
    sequences = [one for row in encoded for one in row]
    codes = _codes(sequences[0] if sequences else None)
    columns = list(zip(*map(_parts, sequences), strict=True)) or [()] * len(codes)
    flat = [np.array(array(code, itertools.chain(*column))) for code, column in zip(codes, columns, strict=True)]
    starts = [np.cumsum([0, *map(len, column)], dtype=np.int64) for column in columns]
    firsts = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    segments = flat[2] if len(flat[2]) else None
    return Tokens(flat[0], starts[0], flat[1], starts[1], firsts, segments=segments)


def steps(tokens: Tokens, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Yield for ever the rows that make up each step; an epoch's last step may be smaller.

    An epoch's order follows from (seed, epoch). Within windows of that order, rows are sorted by length and cut into
    batches, whose order is shuffled again.
    """
    epoch = 0
    while True:
        random = np.random.default_rng([seed, 2, epoch])
        order = random.permutation(len(tokens))
        window = batch_size * _WINDOW
        batches: list[np.ndarray] = []
        for start in range(0, len(order), window):
            part = order[start : start + window]
            part = part[np.argsort(tokens.row_lengths[part], kind="stable")]
            batches += [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
        yield from (batches[index] for index in random.permutation(len(batches)))
        epoch += 1


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Steps that `count` rows make."""
    return -(-count // batch_size)


def cut(positions: np.ndarray, lengths: np.ndarray, most_tokens: int) -> Iterator[np.ndarray]:
    """Cut a step into micro-batches, longest first, of at most `most_tokens` padded tokens (or one sequence)."""
    ordered = positions[np.argsort(-lengths[positions], kind="stable")]
    start = 0
    while start < len(ordered):
        width = int(lengths[ordered[start]])
        stop = start + max(1, most_tokens // width)
        yield ordered[start:stop]
        start = stop


def collate(tokens: Tokens, positions: np.ndarray, adapted: Adapted) -> Batch:
    """Pad the sequences at `positions` into one batch on the model's device."""
    width = int(tokens.lengths[positions].max())
    depth = max(len(tokens.target(position)) for position in positions)
    ids = np.full((len(positions), width), adapted.tokenizer.pad_token_id, dtype=np.int64)
    mask = np.zeros((len(positions), width), dtype=np.int64)
    classes = tokens.targets.dtype.kind == "i"
    targets = np.full((len(positions), depth), IGNORED if classes else np.nan, np.int64 if classes else np.float32)
    segments = None if tokens.segments is None else np.zeros((len(positions), width), dtype=np.int64)
    for row, position in enumerate(positions):
        sequence, target = tokens.sequence(position), tokens.target(position)
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
        targets[row, : len(target)] = target
        if segments is not None and tokens.segments is not None:
            start = tokens.starts[position]
            segments[row, : len(sequence)] = tokens.segments[start : start + len(sequence)]
    device = adapted.device
    arrays = (ids, mask, targets, positions.astype(np.int64))
    batch = Batch(*(torch.from_numpy(array).to(device) for array in arrays))
    return batch if segments is None else replace(batch, segments=torch.from_numpy(segments).to(device))
