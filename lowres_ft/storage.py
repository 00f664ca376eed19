"""Frozen weights (outputs, inputs) as they are held: plain, or quantized in bitsandbytes' formats.

Each form multiplies forward and backward without keeping a dequantized copy. int8 holds row-wise absmax codes,
W = diag(scale) codes (Dettmers et al. 2022, arXiv:2208.07339): the codes are exact in bf16, so one conversion serves
the product and the scale goes on the output. nf4 holds two 4-bit codes a byte, each the index of a quantile of the
normal distribution, times the absolute maximum of its block of 64 (Dettmers et al. 2023, arXiv:2305.14314). Double
quantization holds these maxima in 8 bits too: 4.13 bits a weight in all, not 4.5.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

NF4_BLOCK = 64  # weights that share an absolute maximum
NESTED_BLOCK = 256  # absolute maxima that share one of their own
NESTED_CODES = 256  # values that one can take
_AT_ONCE = 2**22  # weights that are in the dtype of a product at once
_SCALED_AT_ONCE = 2**18  # elements
_STEP = 7.874015718698502e-3  # 1 / 127 in fp32, as bitsandbytes writes it
_FUSED = (torch.bfloat16, torch.float16)  # what the fused kernel computes in

Kernel = Literal["dequantize", "triton"]
"""What multiplies by int8 codes: a product of PyTorch with converted ones, or a kernel of ours that holds none."""


def use(module: nn.Module, kernel: Kernel) -> None:
    """Let all int8 weights of a model be multiplied by a kernel."""
    for weight in module.modules():
        if isinstance(weight, Int8):
            weight.kernel = kernel


Through = Callable[[Callable[[], Tensor]], Tensor]
_through: Through | None = None


@contextmanager
def products(through: Through) -> Iterator[None]:
    """Let each product of a frozen weight pass through a function, which is given what computes it."""
    global _through  # the backward pass may run in another thread
    before, _through = _through, through
    try:
        yield
    finally:
        _through = before


class Storage(nn.Module):
    """A frozen weight, as its buffers."""

    weight: Tensor

    def __init__(self, weight: Tensor, shape: torch.Size) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach())
        self.outputs, self.inputs = shape

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X (N, inputs) times the weight, plus the bias: a new (N, outputs)."""
        return self._product(x, bias) if _through is None else _through(lambda: self._product(x, bias))

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def product_backward(self, dy: Tensor) -> Tensor:
        """Dy (N, outputs) times the weight: a new (N, inputs)."""
        raise NotImplementedError

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that is computed with, (outputs, inputs)."""
        raise NotImplementedError


class Plain(Storage):
    """A weight as it is."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight, weight.shape)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return x @ self.weight.t() if bias is None else torch.addmm(bias, x, self.weight.t())

    def product_backward(self, dy: Tensor) -> Tensor:
        return dy @ self.weight

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.weight.to(dtype)


Part = tuple[slice, Tensor, Tensor | None]
"""Rows of a quantized weight, what stands for them (R, inputs) in a dtype, and the scale (R,) that is yet to come."""


class Coded(Storage):
    """A quantized weight. A few rows at a time are in the dtype of a product, in memory that stays small.

    Where it is large, such as an output layer, that is 2 to 5 times as fast as to convert it whole.
    """

    def _slices(self) -> list[slice]:
        step = max(1, _AT_ONCE // self.inputs)
        return [slice(first, first + step) for first in range(0, self.outputs, step)]

    def _parts(self, dtype: torch.dtype) -> Iterator[Part]:
        raise NotImplementedError

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = None
        for rows, weight, scale in self._parts(x.dtype):
            if scale is None and bias is not None:
                part = torch.addmm(bias[rows], x, weight.t())
            else:
                part = x @ weight.t()
                part = part if scale is None else _scaled(part, scale)
                part = part if bias is None else part.add_(bias[rows])
            if len(weight) == self.outputs:
                return part
            y = x.new_empty(len(x), self.outputs) if y is None else y
            y[:, rows] = part
        assert y is not None
        return y

    def product_backward(self, dy: Tensor) -> Tensor:
        dx = None
        for rows, weight, scale in self._parts(dy.dtype):
            part = dy[:, rows]
            if scale is not None:
                part = _scaled(part.clone(memory_format=torch.contiguous_format), scale)
            part = part @ weight
            if len(weight) == self.outputs:
                return part
            dx = part.to(torch.promote_types(part.dtype, torch.float32)) if dx is None else dx.add_(part)
        assert dx is not None
        return dx.to(dy.dtype)


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    """X (N, outputs) times fp32 factors, in its place; of 16 bits a few rows at a time.

    On a processor PyTorch makes fp32 copies of all that it multiplies so; large ones take longer than the product.
    """
    if x.dtype == scale.dtype or x.device.type != "cpu":
        return x.mul_(scale)
    step = max(1, _SCALED_AT_ONCE // max(1, x.shape[1]))
    for first in range(0, len(x), step):
        x[first : first + step].mul_(scale)
    return x


class Int8(Coded):
    """Codes (outputs, inputs) int8 and the absolute maximum of each row (outputs,), for which 127 stands, fp32."""

    absmax: Tensor

    def __init__(self, codes: Tensor, absmax: Tensor) -> None:
        super().__init__(codes, codes.shape)
        self.register_buffer("absmax", absmax.float())
        self.kernel: Kernel = "dequantize"

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.kernel == "dequantize" or x.dtype not in _FUSED:
            return super()._product(x, bias)
        from lowres_ft import fused

        y = fused.product(x, self.weight, self.absmax * _STEP)
        return y if bias is None else y.add_(bias)

    def product_backward(self, dy: Tensor) -> Tensor:
        if self.kernel == "dequantize" or dy.dtype not in _FUSED:
            return super().product_backward(dy)
        from lowres_ft import fused

        return fused.product_backward(dy, self.weight, self.absmax * _STEP)

    def _parts(self, dtype: torch.dtype) -> Iterator[Part]:
        for rows in self._slices():
            if dtype == torch.float16:
                # 520 products of int8 codes overflow fp16 before the scale could help: dequantize first.
                yield rows, self.rows(rows, dtype), None
            else:
                yield rows, self.weight[rows].to(dtype), self.absmax[rows] * _STEP

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.rows(slice(None), dtype)

    def rows(self, index: Tensor | slice, dtype: torch.dtype) -> Tensor:
        """Rows of the weight that is computed with, (..., inputs).

        They are scaled in bitsandbytes' order: times the absolute maximum over 127, a last bit could differ.
        """
        return (self.weight[index] * self.absmax[index][..., None]).mul_(_STEP).to(dtype)


class Nested(NamedTuple):
    """How absolute maxima are quantized: each is `offset + table[code] * scale`."""

    scale: Tensor
    """Of each block of 256 maxima, fp32."""
    table: Tensor
    """(256,) fp32."""
    offset: Tensor
    """Their mean, () fp32."""


class Nf4(Coded):
    """Packed codes (outputs * inputs / 2, 1) uint8 and the absolute maximum of each block: fp32, or codes of 8 bits.

    bitsandbytes' kernel dequantizes in each pass: on a processor in 5 to 10 % of a product's time, a tenth of what a
    look-up by PyTorch takes. Its rows must be whole blocks: of other widths the processor's kernel makes other weights.
    """

    absmax: Tensor
    scale: Tensor
    table: Tensor
    offset: Tensor

    def __init__(self, packed: Tensor, absmax: Tensor, shape: torch.Size, nested: Nested | None = None) -> None:
        super().__init__(packed, shape)
        assert self.inputs % NF4_BLOCK == 0
        self.nested = nested is not None
        self.register_buffer("absmax", absmax if self.nested else absmax.float())
        for name, part in nested._asdict().items() if nested else ():
            self.register_buffer(name, part)

    def _parts(self, dtype: torch.dtype) -> Iterator[Part]:
        packed, maxima = self.weight.view(self.outputs, -1), self._maxima().view(self.outputs, -1)
        for rows in self._slices():
            codes, absmax = packed[rows].reshape(-1, 1), maxima[rows].flatten()
            shape = [len(packed[rows]), self.inputs]
            yield rows, torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, NF4_BLOCK, "nf4", shape, dtype), None

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        found = torch.empty(self.outputs, self.inputs, dtype=dtype, device=self.weight.device)
        for rows, weight, _ in self._parts(dtype):
            found[rows] = weight
        return found

    def _maxima(self) -> Tensor:
        """The absolute maximum of each block, fp32."""
        if not self.nested:
            return self.absmax
        found: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
            self.absmax, self.scale, self.table, NESTED_BLOCK, torch.float32
        )
        return found.add_(self.offset)
