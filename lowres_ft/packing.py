"""Micro-batches of a step: a sequence a row, or packed, several in a row that do not see each other.

Packed tokens know their place in their own sequence, from which transformers makes a mask that keeps sequences apart
(`masking_utils.find_packed_sequence_indices`); the adapter's dropout is keyed by the sequence and that place, so that
a token is masked as it would be alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from heapq import heapreplace

import numpy as np
import torch

from lowres_ft.batches import Tokens, collate, cut
from lowres_ft.model import Adapted
from lowres_ft.plan import Plan
from lowres_ft.tasks.base import IGNORED, Batch

_TRIED = 16  # numbers of rows
_FAR = 4096  # tokens of a row whose attention costs as much as all else: 24 h^2 = 4 h T, with some 700 features h


def micro_batches(
    positions: np.ndarray, tokens: Tokens, plan: Plan, adapted: Adapted
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Cut a step as a plan says; yield the sequences of each micro-batch, by their positions, and their tokens."""
    most = plan.micro_batch_tokens
    if not plan.packing:
        for part in cut(positions, tokens.lengths, most):
            yield part, collate(tokens, part, adapted)
        return
    for rows in pack(positions, tokens.lengths, most):
        yield np.concatenate(rows), collate_packed(tokens, rows, adapted)


def pack(positions: np.ndarray, lengths: np.ndarray, most_tokens: int) -> Iterator[list[np.ndarray]]:
    """Cut a step into micro-batches of rows that are about equally long, longer ones first.

    A row is not longer than the longest sequence of all `lengths`. Into how many the sequences are put is what costs
    least, so that those of one length stay alone.
    """
    ordered = positions[np.argsort(-lengths[positions], kind="stable")]
    sizes = lengths[ordered].tolist()
    limit = max(sizes[0], min(int(lengths.max()), most_tokens))
    counts = np.geomspace(max(1, -(-sum(sizes) // limit)), len(sizes), _TRIED).round().astype(int)
    tried = (_balanced(sizes, count) for count in np.unique(counts)[::-1])
    filled, rows = min((one for one in tried if max(one[0]) <= limit), key=_cost)
    for part in cut(np.arange(len(rows)), np.array(filled), most_tokens):
        yield [ordered[rows[at]] for at in part]


def _balanced(sizes: list[int], count: int) -> tuple[list[int], list[list[int]]]:
    """Fill `count` rows, longest sequence first, always the emptiest; return how full they are, and with which."""
    heap = [(0, at) for at in range(count)]
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for number, size in enumerate(sizes):
        _, at = heap[0]
        rows[at].append(number)
        filled[at] += size
        heapreplace(heap, (filled[at], at))
    return filled, rows


def _cost(packed: tuple[list[int], list[list[int]]]) -> int:
    """Padded tokens, and what their attention costs."""
    filled, _ = packed
    width = max(filled)
    return len(filled) * width * (_FAR + width)


def collate_packed(tokens: Tokens, rows: Sequence[np.ndarray], adapted: Adapted) -> Batch:
    """Put the sequences of each row one behind the other, for tasks with a target a token."""
    width = max(int(tokens.lengths[row].sum()) for row in rows)
    shape = (len(rows), width)
    ids = np.full(shape, adapted.tokenizer.pad_token_id, dtype=np.int64)
    targets = np.full(shape, IGNORED, dtype=np.int64)
    # Each padding token is a sequence of its own.
    mask, sequences, places = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    for at, row in enumerate(rows):
        start = 0
        for position in row:
            part = np.s_[at, start : start + int(tokens.lengths[position])]
            ids[part], targets[part], mask[part] = tokens.sequence(position), tokens.target(position), 1
            sequences[part], places[part] = position, np.arange(tokens.lengths[position])
            start += int(tokens.lengths[position])
    arrays = (ids, mask, targets, sequences)
    batch = Batch(*(torch.from_numpy(array).to(adapted.device) for array in arrays))
    return replace(batch, places=torch.from_numpy(places).to(adapted.device))
