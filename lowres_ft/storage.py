"""Frozen weights (outputs, inputs) as they are held: plain, or quantized in bitsandbytes' formats.

Each form multiplies forward and backward without keeping a dequantized copy. int8 holds row-wise absmax codes,
W = diag(scale) codes (Dettmers et al. 2022, arXiv:2208.07339): the codes are exact in bf16, so one conversion serves
the product and the scale goes on the output. nf4 holds two 4-bit codes a byte, each the index of a quantile of the
normal distribution, times the absolute maximum of its block of 64 (Dettmers et al. 2023, arXiv:2305.14314). Double
quantization holds these maxima in 8 bits too: 4.13 bits a weight in all, not 4.5.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

NF4_BLOCK = 64  # weights that share an absolute maximum
NESTED_BLOCK = 256  # absolute maxima that share one of their own
_STEP = 7.874015718698502e-3  # 1 / 127 in fp32, as bitsandbytes writes it


class Storage(nn.Module):
    """A frozen weight, as its buffers."""

    weight: Tensor

    def __init__(self, weight: Tensor, shape: torch.Size) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach())
        self.outputs, self.inputs = shape

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X (N, inputs) times the weight, plus the bias: a new (N, outputs)."""
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

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return x @ self.weight.t() if bias is None else torch.addmm(bias, x, self.weight.t())

    def product_backward(self, dy: Tensor) -> Tensor:
        return dy @ self.weight

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.weight.to(dtype)


class Int8(Storage):
    """Codes (outputs, inputs) int8 and the absolute maximum of each row (outputs,), for which 127 stands, fp32."""

    absmax: Tensor
    scale: Tensor
    """What a code counts, (outputs,) fp32."""

    def __init__(self, codes: Tensor, absmax: Tensor) -> None:
        super().__init__(codes, codes.shape)
        self.register_buffer("absmax", absmax.float())
        self.register_buffer("scale", self.absmax * _STEP)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.dtype == torch.float16:
            # 520 products of int8 codes overflow fp16 before the scale could help: dequantize first.
            y = x @ self.dequantized(x.dtype).t()
        else:
            y = (x @ self.weight.to(x.dtype).t()).mul_(self.scale)
        return y if bias is None else y.add_(bias)

    def product_backward(self, dy: Tensor) -> Tensor:
        if dy.dtype == torch.float16:
            return dy @ self.dequantized(dy.dtype)
        return (dy * self.scale).to(dy.dtype) @ self.weight.to(dy.dtype)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        # In bitsandbytes' order: times the scale, a weight could differ in its last bit.
        return (self.weight * self.absmax[:, None]).mul_(_STEP).to(dtype)


class Nested(NamedTuple):
    """How absolute maxima are quantized: each is `offset + table[code] * scale`."""

    scale: Tensor
    """Of each block of 256 maxima, fp32."""
    table: Tensor
    """(256,) fp32."""
    offset: Tensor
    """Their mean, () fp32."""


class Nf4(Storage):
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

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = self.dequantized(x.dtype)
        return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())

    def product_backward(self, dy: Tensor) -> Tensor:
        return dy @ self.dequantized(dy.dtype)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        found: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            self.weight, self._maxima(), NF4_BLOCK, "nf4", [self.outputs, self.inputs], dtype
        )
        return found

    def _maxima(self) -> Tensor:
        """The absolute maximum of each block, fp32."""
        if not self.nested:
            return self.absmax
        found: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
            self.absmax, self.scale, self.table, NESTED_BLOCK, torch.float32
        )
        return found.add_(self.offset)
