"""Dropout whose masks follow from keys: no cut of a step and no number of processes changes them."""

import torch
from torch import Tensor

from lowres_ft.errors import ModelError

_MASK64 = (1 << 64) - 1
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of the size of an element, in bytes."""


class DropoutKeys:
    """What keys the dropout masks of a model: shared by its layers and set before each micro-batch."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.step = 0
        self.rows: Tensor | None = None
        self.places: Tensor | None = None
        self.length = 0

    def set(self, step: int, rows: Tensor, length: int, places: Tensor | None = None) -> None:
        """Turn dropout on for a micro-batch of `rows` (B,), padded to `length` tokens.

        Where several sequences share a row, `rows` (B, T) tells the one of each token, and `places` (B, T) its place.
        """
        self.step, self.rows, self.length, self.places = step, rows, length, places

    def clear(self) -> None:
        """Turn dropout off."""
        self.rows = None


class DropoutMask:
    """A dropout mask that can be made again: in the forward pass and, from the same keys, in the backward pass."""

    def __init__(self, keys: DropoutKeys, name_key: int, probability: float, shape: torch.Size) -> None:
        assert keys.rows is not None
        batch, length = len(keys.rows), keys.length
        self.rows, self.places = keys.rows.reshape(batch, -1), keys.places
        if tuple(shape[:-1]) in ((batch, length), (batch * length,)):  # OPT flattens texts, one behind the other
            self.positions = length
        elif tuple(shape[:-1]) == (batch,) and keys.places is None:
            self.positions = 1
        elif shape[0] == 1:
            # An input that all examples share, such as DeBERTa's relative positions, is keyed by the step alone.
            self.rows, self.places = torch.full((1, 1), -1, device=keys.rows.device), None
            self.positions = shape[1] if len(shape) > 2 else 1
        else:
            raise ModelError(
                f"an adapted layer gets an input of shape {tuple(shape)} for {batch} texts of {length} tokens, "
                "so its dropout cannot be keyed",
                hint="Use method.dropout=0, or leave that layer out with method.targets.",
            )
        self.key = mix(keys.seed, keys.step, name_key)
        self.features = shape[-1]
        self.probability = probability
        self.scale = 1 / (1 - probability)

    def masked(self, x: Tensor) -> Tensor:
        """A copy of x (N, features) with zeros where the mask says so; `scale` is left to the smaller product."""
        kept = self._mask(x.device).to(_INTEGERS[x.element_size()])
        return (x.view(kept.dtype) & kept).view(x.dtype)

    def _mask(self, device: torch.device) -> Tensor:
        """(N, features) int32, all bits set where an element is kept.

        A counter-based hash: each element follows from its key, row, position and feature. It goes on the bits of x,
        as comparing and multiplying cost a processor more (MiniLM, dropout 0.1: 5,155 against 4,258 tokens/s).
        """
        position = torch.arange(self.positions, device=device) if self.places is None else self.places.to(device)
        row = _mix_tensor(_mix_tensor(self.rows.to(device) ^ _signed(self.key)) + position)
        feature = _mix_tensor(torch.arange(self.features, device=device))
        bits = row.reshape(-1, 1).to(torch.int32) ^ feature.to(torch.int32)
        for factor, shift in ((0x7FEB352D, 15), (0x2C1B3C6D, 13)):
            bits.mul_(factor).bitwise_xor_(bits >> shift)
        # The arithmetic shift leaves bits below 2^31; those below the threshold are dropped.
        threshold = int(self.probability * 2**31)
        return bits.neg_().add_(threshold - 1).bitwise_right_shift_(31)


def mix(*values: int) -> int:
    """Hash of whole numbers to 64 bits: splitmix64 (Steele et al. 2014, doi:10.1145/2660193.2660195), chained."""
    state = 0
    for value in values:
        state = (state ^ (value & _MASK64)) + 0x9E3779B97F4A7C15 & _MASK64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK64
        state ^= state >> 31
    return state


def _mix_tensor(values: Tensor) -> Tensor:
    """splitmix64 of each int64; products wrap."""
    state = values + _signed(0x9E3779B97F4A7C15)
    state = (state ^ (state >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> 27 & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return state ^ (state >> 31 & (1 << 33) - 1)


def _signed(value: int) -> int:
    """The int64 with the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value
