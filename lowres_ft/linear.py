"""AdaptedLinear: a frozen linear layer and its low-rank adapter in one autograd function.

With x (N, inputs), a frozen W (outputs, inputs), A (rank, inputs) and B (outputs, rank):

    y = x W^T + b + s (m * x) A^T B^T

where s scales the update and m is the dropout mask over its keep probability. PEFT computes the same in a dozen
operations with a copy of x in fp32. Here a layer keeps x (shared by all layers that read it) and h = (m * x) A^T, and

    dB = s dy^T h,   dh = s dy B,   dA = dh^T (m * x),   dx = dy W + m * (dh A).

A and B are fp32 parameters; their copies in the dtype of x live only within a call. An int8 W holds row-wise
absmax codes: W = diag(scale) codes. The codes are exact in bf16, so one conversion serves the product and the scale
goes on the output (Dettmers et al. 2022, arXiv:2208.07339, for the format).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lowres_ft.errors import ModelError
from lowres_ft.methods.base import LowRank

_MASK64 = (1 << 64) - 1
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of the size of an element, in bytes."""


class DropoutKeys:
    """What keys the dropout masks of a model: shared by its layers and set before each micro-batch."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.step = 0
        self.rows: Tensor | None = None
        self.length = 0

    def set(self, step: int, rows: Tensor, length: int) -> None:
        """Turn dropout on for a micro-batch of `rows` (B,), padded to `length` tokens."""
        self.step, self.rows, self.length = step, rows, length

    def clear(self) -> None:
        """Turn dropout off."""
        self.rows = None


class AdaptedLinear(nn.Module):
    """Stands in for a linear layer (`nn.Linear`, GPT-2's `Conv1D`, bitsandbytes' `Linear8bitLt`)."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    lora_A: nn.Parameter | None  # noqa: N815 (PEFT's names)
    lora_B: nn.Parameter | None  # noqa: N815

    def __init__(self, weight: Tensor, bias: Tensor | None, *, scale: Tensor | None = None) -> None:
        """Take over a frozen weight (outputs, inputs), with `scale` (outputs,) fp32 where it holds int8 codes."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight.detach())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.transposed = False  # True where the layer that this one stands in for holds (inputs, outputs)
        self.scaling = 1.0
        self.dropout = 0.0
        self.keys: DropoutKeys | None = None
        self.name_key = 0

    def adapt(self, name: str, adapter: LowRank, keys: DropoutKeys) -> None:
        """Add an adapter: A uniform within 1 / sqrt(inputs), as PEFT's, by a generator of its own; B zero."""
        self.name_key = _mix(*name.encode())
        generator = torch.Generator().manual_seed(_mix(keys.seed, self.name_key) >> 1)
        bound = 1 / math.sqrt(self.in_features)
        a = torch.empty(adapter.rank, self.in_features).uniform_(-bound, bound, generator=generator)
        device = self.weight.device
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, adapter.rank, device=device))
        self.scaling, self.dropout, self.keys = adapter.scaling, adapter.dropout, keys

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        keep = None
        if self.dropout and self.lora_A is not None and self.keys is not None and self.keys.rows is not None:
            keep = _Keep(self.keys, self.name_key, self.dropout, x.shape)
        flat = x.reshape(-1, self.in_features)  # here, as a view that leaves the function could not be changed in place
        y: Tensor = _Adapted.apply(  # type: ignore[no-untyped-call]
            flat, self.weight, self.scale, self.bias, self.lora_A, self.lora_B, self.scaling, keep
        )
        return y.view(*x.shape[:-1], self.out_features)

    def delta(self) -> Tensor:
        """The adapter's update of the weight, (outputs, inputs) in fp32."""
        assert self.lora_A is not None
        assert self.lora_B is not None
        b, a = (tensor.detach().cpu().double() for tensor in (self.lora_B, self.lora_A))  # MPS has no float64
        return (b @ a).mul_(self.scaling).float().to(self.weight.device)


class _Keep:
    """A dropout mask that can be made again: in the forward pass and, from the same keys, in the backward pass."""

    def __init__(self, keys: DropoutKeys, name_key: int, probability: float, shape: torch.Size) -> None:
        assert keys.rows is not None
        batch, length = len(keys.rows), keys.length
        self.positions = shape[1] if len(shape) > 2 else 1
        if tuple(shape[:-1]) in ((batch, length), (batch,)):
            self.rows = keys.rows
        elif tuple(shape[:-1]) == (batch * length,):  # texts one behind the other, as OPT flattens them
            self.rows, self.positions = keys.rows, length
        elif shape[0] == 1:
            # An input that all examples share, such as DeBERTa's relative positions, is keyed by the step alone.
            self.rows = torch.full((1,), -1, device=keys.rows.device)
        else:
            raise ModelError(
                f"an adapted layer gets an input of shape {tuple(shape)} for {batch} texts of {length} tokens, "
                "so its dropout cannot be keyed",
                hint="Use method.dropout=0, or leave that layer out with method.targets.",
            )
        self.key = _mix(keys.seed, keys.step, name_key)
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
        position = torch.arange(self.positions, device=device)
        row = _mix_tensor(_mix_tensor(self.rows.to(device) ^ _signed(self.key))[:, None] + position)
        feature = _mix_tensor(torch.arange(self.features, device=device))
        bits = row.reshape(-1, 1).to(torch.int32) ^ feature.to(torch.int32)
        for factor, shift in ((0x7FEB352D, 15), (0x2C1B3C6D, 13)):
            bits.mul_(factor).bitwise_xor_(bits >> shift)
        # The arithmetic shift leaves bits below 2^31; those below the threshold are dropped.
        threshold = int(self.probability * 2**31)
        return bits.neg_().add_(threshold - 1).bitwise_right_shift_(31)


class _Adapted(torch.autograd.Function):
    """The formulas at the top of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scaling: float,
        keep: _Keep | None,
    ) -> Tensor:
        y = _frozen_product(x, weight, scale, bias)
        h = None
        if a is not None and b is not None:
            dropped = x if keep is None else keep.masked(x)
            h = dropped @ a.to(x.dtype).t()
            if keep is not None:
                h.mul_(keep.scale)
            y.addmm_(h, b.to(x.dtype).t(), alpha=scaling)
        ctx.save_for_backward(x, weight, scale, a, b, h)
        ctx.scaling, ctx.keep = scaling, keep
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, a, b, h = ctx.saved_tensors
        dy = grads[0]
        dx = _frozen_product_backward(dy, weight, scale) if ctx.needs_input_grad[0] else None
        da = db = None
        if a is not None:
            dh = (dy @ b.to(dy.dtype)).mul_(ctx.scaling)
            db = (dy.t() @ h).float().mul_(ctx.scaling)
            if ctx.keep is not None:
                dh.mul_(ctx.keep.scale)
            dropped = x if ctx.keep is None else ctx.keep.masked(x)
            da = (dh.t() @ dropped).float()
            if dx is not None and ctx.keep is None:
                dx.addmm_(dh, a.to(dy.dtype))
            elif dx is not None:
                dx.add_(ctx.keep.masked(dh @ a.to(dy.dtype)))
        return dx, None, None, None, da, db, None, None


def _frozen_product(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """X (N, inputs) times the frozen weight, plus the bias: a new (N, outputs)."""
    if scale is None:
        return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
    if x.dtype == torch.float16:
        # 520 products of int8 codes overflow fp16 before the scale could help: dequantize first.
        y = x @ _dequantized(weight, scale, x.dtype).t()
    else:
        y = (x @ weight.to(x.dtype).t()).mul_(scale)
    return y if bias is None else y.add_(bias)


def _frozen_product_backward(dy: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """Dy (N, outputs) times the frozen weight: a new (N, inputs)."""
    if scale is None:
        return dy @ weight
    if dy.dtype == torch.float16:
        return dy @ _dequantized(weight, scale, dy.dtype)
    return (dy * scale).to(dy.dtype) @ weight.to(dy.dtype)


def _dequantized(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes * scale[:, None]).to(dtype)


def _mix(*values: int) -> int:
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
