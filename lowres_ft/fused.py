"""Products of int8 weights on a GPU in one kernel: codes become 16-bit tiles on the chip, and none lie in memory.

With x (M, inputs), codes C (outputs, inputs) and the scale s of each row, y = (x C^T) s and dx = dy (s C), summed in
fp32. In the second the tile of codes is scaled, not dy: in fp16 a gradient times a scale would vanish.

LLM.int8 (bitsandbytes' own product) is no third way here: it rounds x to 8 bits too, so it changes the result, and what
changes the result is the recipe's business. Its logic is tested in Triton's interpreter; not yet run on a GPU.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILES = ((64, 64, 64, 4), (128, 64, 64, 4), (64, 128, 64, 4), (128, 128, 64, 8), (16, 64, 128, 4))
"""Rows, outputs and inputs of a tile, and its warps."""


def _configs() -> list[Any]:
    """What is tried on the first product of a shape; the interpreter cannot time, so it gets one."""
    tiles = _TILES[-1:] if os.environ.get("TRITON_INTERPRET") == "1" else _TILES
    return [
        triton.Config({"M": m, "N": n, "K": k}, num_warps=warps, num_stages=stages)
        for m, n, k, warps in tiles
        for stages in (2, 4)[: 1 if len(tiles) == 1 else 2]
    ]


@triton.autotune(configs=_configs(), key=["about", "outputs", "inputs"])  # type: ignore[untyped-decorator]
@triton.jit  # type: ignore[untyped-decorator]
def _forward(
    x: Any,
    codes: Any,
    scale: Any,
    y: Any,
    rows: Any,
    outputs: Any,
    inputs: Any,
    about: Any,
    M: tl.constexpr,  # noqa: N803 (as in the formulas)
    N: tl.constexpr,  # noqa: N803
    K: tl.constexpr,  # noqa: N803
) -> None:
    m = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    n = (tl.program_id(1) * N + tl.arange(0, N)).to(tl.int64)
    sums = tl.zeros((M, N), tl.float32)
    for first in range(0, inputs, K):
        k = first + tl.arange(0, K)
        here = k < inputs
        left = tl.load(x + m[:, None] * inputs + k[None, :], mask=(m < rows)[:, None] & here[None, :], other=0.0)
        right = tl.load(codes + n[None, :] * inputs + k[:, None], mask=(n < outputs)[None, :] & here[:, None], other=0)
        sums = tl.dot(left, right.to(left.dtype), sums)
    sums *= tl.load(scale + n, mask=n < outputs, other=0.0)[None, :]
    place = y + m[:, None] * outputs + n[None, :]
    tl.store(place, sums.to(y.dtype.element_ty), mask=(m < rows)[:, None] & (n < outputs)[None, :])


@triton.autotune(configs=_configs(), key=["about", "outputs", "inputs"])  # type: ignore[untyped-decorator]
@triton.jit  # type: ignore[untyped-decorator]
def _backward(
    dy: Any,
    codes: Any,
    scale: Any,
    dx: Any,
    rows: Any,
    outputs: Any,
    inputs: Any,
    about: Any,
    M: tl.constexpr,  # noqa: N803
    N: tl.constexpr,  # noqa: N803
    K: tl.constexpr,  # noqa: N803
) -> None:
    m = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    k = (tl.program_id(1) * N + tl.arange(0, N)).to(tl.int64)
    sums = tl.zeros((M, N), tl.float32)
    for first in range(0, outputs, K):
        n = first + tl.arange(0, K)
        here = n < outputs
        left = tl.load(dy + m[:, None] * outputs + n[None, :], mask=(m < rows)[:, None] & here[None, :], other=0.0)
        right = tl.load(
            codes + n[:, None].to(tl.int64) * inputs + k[None, :], mask=here[:, None] & (k < inputs)[None, :], other=0
        )
        weight = right.to(tl.float32) * tl.load(scale + n, mask=here, other=0.0)[:, None]
        sums = tl.dot(left, weight.to(left.dtype), sums)
    place = dx + m[:, None] * inputs + k[None, :]
    tl.store(place, sums.to(dx.dtype.element_ty), mask=(m < rows)[:, None] & (k < inputs)[None, :])


def product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """X (M, inputs) in 16 bits times an int8 weight: a new (M, outputs)."""
    return _run(_forward, x, codes, scale, codes.shape[0])


def product_backward(dy: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Dy (M, outputs) in 16 bits times an int8 weight: a new (M, inputs)."""
    return _run(_backward, dy, codes, scale, codes.shape[1])


def _run(kernel: Any, left: Tensor, codes: Tensor, scale: Tensor, width: int) -> Tensor:
    """Rows are told to the tuner by the power of two above them, as each micro-batch has another number."""
    found = left.new_empty(len(left), width)
    if found.numel():
        outputs, inputs = codes.shape
        sizes = (len(left), outputs, inputs, 1 << (len(left) - 1).bit_length())
        with torch.cuda.device_of(left):  # type: ignore[no-untyped-call]
            kernel[lambda tile: (triton.cdiv(len(left), tile["M"]), triton.cdiv(width, tile["N"]))](
                left.contiguous(), codes, scale, found, *sizes
            )
    return found
