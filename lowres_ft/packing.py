"""Micro-batches of a step: a sequence a row, or packed, several in a row that do not see each other.

Packed tokens know their place in their own sequence, from which transformers makes a mask that keeps sequences apart
(`masking_utils.find_packed_sequence_indices`); the adapter's dropout is keyed by the sequence and that place, so that
a token is masked as it would be alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from lowres_ft.batches import Tokens, collate, cut
from lowres_ft.model import Adapted
from lowres_ft.plan import Plan
from lowres_ft.tasks.base import IGNORED, Batch


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
    """Cut a step into micro-batches of rows as long as the longest sequence of all `lengths`, or shorter.

    Each sequence, longest first, goes into the first row that has room for it; longer rows are handed out first.
    """
    width = int(lengths.max())
    rows: list[list[int]] = []
    room: list[int] = []
    for position in positions[np.argsort(-lengths[positions], kind="stable")].tolist():
        length = int(lengths[position])
        at = next((at for at, left in enumerate(room) if left >= length), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(width)
        rows[at].append(position)
        room[at] -= length
    filled = np.array([width - left for left in room])
    for part in cut(np.arange(len(rows)), filled, most_tokens):
        yield [np.array(rows[at]) for at in part]


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
