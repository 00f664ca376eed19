"""Frozen weights (outputs, inputs) as they are held: plain, or quantized in bitsandbytes' formats.

Each form multiplies forward and backward without keeping a dequantized copy. int8 holds row-wise absmax codes,
W = diag(scale) codes (Dettmers et al. 2022, arXiv:2208.07339): the codes are exact in bf16, so one conversion serves
the product and the scale goes on the output. nf4 holds two 4-bit codes a byte, each the index of a quantile of the
normal distribution, times the absolute maximum of its block of 64 (Dettmers et al. 2023, arXiv:2305.14314).
"""

import torch
from torch import Tensor, nn

NF4_BLOCK = 64  # weights that share an absolute maximum


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
    """Codes (outputs, inputs) int8 and their scale (outputs,) fp32."""

    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__(codes, codes.shape)
        self.register_buffer("scale", scale)

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
        return (self.weight * self.scale[:, None]).to(dtype)


class Nf4(Storage):
    """Packed codes (outputs * inputs / 2, 1) uint8 and the absolute maximum of each block, fp32.

    bitsandbytes' kernel dequantizes in each pass: on a processor in 5 to 10 % of a product's time, a tenth of what a
    look-up by PyTorch takes. Its rows must be whole blocks: of other widths the processor's kernel makes other weights.
    """

    absmax: Tensor

    def __init__(self, packed: Tensor, absmax: Tensor, shape: torch.Size) -> None:
        super().__init__(packed, shape)
        assert self.inputs % NF4_BLOCK == 0
        self.register_buffer("absmax", absmax.float())

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = self.dequantized(x.dtype)
        return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())

    def product_backward(self, dy: Tensor) -> Tensor:
        return dy @ self.dequantized(dy.dtype)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        found: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            self.weight, self.absmax, NF4_BLOCK, "nf4", [self.outputs, self.inputs], dtype
        )
        return found
