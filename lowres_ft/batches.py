"""Steps from data and seed; micro-batches from a plan.

Which examples make up a step follows from the data and the seed alone. How a step is cut into micro-batches is the
plan's business and changes nothing but rounding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch

from lowres_ft.data import Rows
from lowres_ft.files import writing
from lowres_ft.model import Adapted
from lowres_ft.tasks.base import IGNORED, Batch, Encoded

_WINDOW = 16  # batches that are sorted by length together, so that little of a batch is padding
_AT_ONCE = 1024  # texts that pass the tokenizer together
_PARTS = (attrgetter("ids"), attrgetter("targets"))


@dataclass(frozen=True, eq=False)
class Tokens:
    """A tokenized split: flat ids and targets on disk, and where each sequence begins."""

    ids: np.ndarray
    """(all tokens,) int32."""
    starts: np.ndarray
    """(N + 1,) int64 offsets into ids."""
    targets: np.ndarray
    """(all targets,) int32."""
    target_starts: np.ndarray
    """(N + 1,) int64 offsets into targets."""
    rows: Rows | None = None
    """The rows that the sequences are of; None for texts that came without a file."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of each sequence."""
        return np.diff(self.starts)

    def sequence(self, position: int) -> np.ndarray:
        """Token ids of one sequence."""
        return self.ids[self.starts[position] : self.starts[position + 1]]

    def target(self, position: int) -> np.ndarray:
        """Targets of one sequence."""
        return self.targets[self.target_starts[position] : self.target_starts[position + 1]]

    def supervised(self, positions: np.ndarray) -> int:
        """How many items of these sequences the loss counts."""
        return sum(int((self.target(position) != IGNORED).sum()) for position in positions)

    def where(self, positions: np.ndarray) -> list[str]:
        """File and line of these sequences."""
        if self.rows is None:
            return [f"text {position + 1}" for position in positions]
        return [str(where) for where in self.rows.table["where"].take(self.rows.index[positions]).to_pylist()]


def tokenize(adapted: Adapted, rows: Rows, path: Path) -> Tokens:
    """Tokenize a split into files at `path` (.ids and .targets), which are then memory-mapped."""
    files = [path.with_suffix(ending) for ending in (".ids", ".targets")]
    counts: list[list[int]] = [[0], [0]]
    with writing(path), open(files[0], "wb") as ids, open(files[1], "wb") as targets:
        examples = rows.examples(adapted.task)
        while part := [example for _, example in zip(range(_AT_ONCE), examples, strict=False)]:
            for encoded in adapted.task.encode(adapted.tokenizer, part):
                for file, values, count in zip((ids, targets), (encoded.ids, encoded.targets), counts, strict=True):
                    file.write(np.array(values, dtype=np.int32).tobytes())
                    count.append(len(values))
    flat = [np.memmap(file, dtype=np.int32, mode="r") for file in files]
    starts = [np.cumsum(count, dtype=np.int64) for count in counts]
    return Tokens(flat[0], starts[0], flat[1], starts[1], rows)


def in_memory(encoded: Sequence[Encoded]) -> Tokens:
    """A few sequences that were encoded already."""
    flat = [np.array([value for one in encoded for value in part(one)], dtype=np.int32) for part in _PARTS]
    starts = [np.cumsum([0, *(len(part(one)) for one in encoded)], dtype=np.int64) for part in _PARTS]
    return Tokens(flat[0], starts[0], flat[1], starts[1])


def steps(tokens: Tokens, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Yield for ever the positions that make up each step; an epoch's last step may be smaller.

    An epoch's order follows from (seed, epoch). Within windows of that order, sequences are sorted by length and cut
    into batches, whose order is shuffled again.
    """
    epoch = 0
    while True:
        random = np.random.default_rng([seed, 2, epoch])
        order = random.permutation(len(tokens))
        window = batch_size * _WINDOW
        batches: list[np.ndarray] = []
        for start in range(0, len(order), window):
            part = order[start : start + window]
            part = part[np.argsort(tokens.lengths[part], kind="stable")]
            batches += [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
        yield from (batches[index] for index in random.permutation(len(batches)))
        epoch += 1


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Steps that `count` sequences make."""
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
    targets = np.full((len(positions), depth), IGNORED, dtype=np.int64)
    for row, position in enumerate(positions):
        sequence, target = tokens.sequence(position), tokens.target(position)
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
        targets[row, : len(target)] = target
    device = adapted.device
    arrays = (ids, mask, targets, positions.astype(np.int64))
    return Batch(*(torch.from_numpy(array).to(device) for array in arrays))
