"""Layers that stand in for frozen linear layers, each with its adapter: PEFT's parameters, our own products.

With x (N, inputs), a frozen W (outputs, inputs), A (rank, inputs) and B (outputs, rank), a low-rank layer computes

    y = x W^T + b + s (m * x) A^T B^T

where s scales the update and m is the dropout mask over its keep probability. PEFT computes the same in a dozen
operations with a copy of x in fp32. Here a layer keeps x (shared by all layers that read it) and h = (m * x) A^T, and

    dB = s dy^T h,   dh = s dy B,   dA = dh^T (m * x),   dx = dy W + m * (dh A).

A and B are fp32 parameters; their copies in the dtype of x live only within a call.

PiSSA (Meng et al. 2024, arXiv:2404.02948) begins with factors A0 and B0 of W's principal part and takes them back: its
update is B A - B0 A0. It is computed, and saved, as one of twice the rank, made of differences, so that 16 bits hold
what was learned:

    B A - B0 A0 = [B, B - B0] [A - A0; A0].

A layer with a magnitude (DoRA, Liu et al. 2024, arXiv:2402.09353) computes, with V = W + s B A and g = m / ||V||,

    y = g (x V^T) + b,   ||V||^2 = ||W||^2 + 2 s B . (W A^T) + s^2 B (A A^T) . B   for each row,

where m (outputs,) is learned and the norm counts as constant in the gradient. The right-hand side costs a product of
`rank` rows and never makes V.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lowres_ft import limits
from lowres_ft.dropout import DropoutKeys, DropoutMask, mix
from lowres_ft.factorize import principal
from lowres_ft.methods.base import Adapter, LowRank, Scale
from lowres_ft.storage import Storage

FROZEN_HALVES = (".lora_A0", ".lora_B0")
"""How the names of tensors end that are kept with an adapter, but not trained."""


class AdaptedLinear(nn.Module):
    """Stands in for a linear layer (`nn.Linear`, GPT-2's `Conv1D`, bitsandbytes' `Linear8bitLt` and `Linear4bit`)."""

    bias: Tensor | None

    def __init__(self, storage: Storage, bias: Tensor | None, *, transposed: bool = False) -> None:
        """Take over a frozen weight; `transposed` says that the layer stood in for holds (inputs, outputs)."""
        super().__init__()
        self.storage = storage
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.transposed = transposed
        self.in_features, self.out_features = storage.inputs, storage.outputs

    @property
    def weight(self) -> Tensor:
        """The weight as it is held; models ask for its device and dtype."""
        return self.storage.weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        flat = x.reshape(-1, self.in_features)  # here, as a view that leaves a function could not be changed in place
        return self.product(flat, x.shape).view(*x.shape[:-1], self.out_features)

    def product(self, x: Tensor, shape: torch.Size) -> Tensor:
        """(N, inputs) -> (N, outputs), where the layer's input has `shape`."""
        return frozen(x, self.storage, self.bias)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight (outputs, inputs) in fp32 and bias of a plain layer that computes the same."""
        return self.storage.dequantized(), self.bias

    def saved(self) -> dict[str, Tensor]:
        """What a bundle holds of the adapter."""
        return {name: parameter.detach() for name, parameter in self.named_parameters(recurse=False)}


class LowRankLinear(AdaptedLinear):
    """A frozen linear layer and its low-rank adapter."""

    lora_A0: Tensor | None  # noqa: N815 (PEFT's names)
    lora_B0: Tensor | None  # noqa: N815

    def __init__(
        self, storage: Storage, bias: Tensor | None, adapter: LowRank, name: str, keys: DropoutKeys, **options: bool
    ) -> None:
        """Begin with A uniform within 1 / sqrt(inputs), as PEFT's, by a generator of its own, and B zero."""
        super().__init__(storage, bias, **options)
        self.name_key = mix(*name.encode())
        generator = torch.Generator().manual_seed(mix(keys.seed, self.name_key) >> 1)
        bound = 1 / math.sqrt(self.in_features)
        a = torch.empty(adapter.rank, self.in_features).uniform_(-bound, bound, generator=generator)
        device = storage.weight.device
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, adapter.rank, device=device))
        self.register_buffer("lora_A0", None)
        self.register_buffer("lora_B0", None)
        self.scaling, self.dropout, self.keys = adapter.scaling, adapter.dropout, keys

    @torch.no_grad()
    def begin_with(self, update: Tensor) -> None:
        """Begin with the principal part of `update` (outputs, inputs)."""
        a, b = principal(update, len(self.lora_A))
        self.lora_A.copy_(a * self.scaling**-0.5)
        self.lora_B.copy_(b * self.scaling**-0.5)

    def take_back(self) -> None:
        """Take the update as it stands back, for good."""
        self.lora_A0, self.lora_B0 = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole update."""
        if self.lora_A0 is None or self.lora_B0 is None:
            return self.lora_A, self.lora_B
        a = torch.cat([self.lora_A - self.lora_A0, self.lora_A0])
        return a, torch.cat([self.lora_B, self.lora_B - self.lora_B0], dim=1)

    def product(self, x: Tensor, shape: torch.Size) -> Tensor:
        return low_rank(x, self.storage, self.bias, *self.factors(), self.scaling, self.mask(shape))

    def mask(self, shape: torch.Size) -> DropoutMask | None:
        """The dropout mask of an input of that shape; None where nothing is dropped."""
        if not self.dropout or self.keys.rows is None:
            return None
        return DropoutMask(self.keys, self.name_key, self.dropout, shape)

    def delta(self) -> Tensor:
        """The adapter's update of the weight, (outputs, inputs) in fp32."""
        a, b = (tensor.detach().cpu().double() for tensor in self.factors())  # MPS has no float64
        return (b @ a).mul_(self.scaling).float().to(self.weight.device)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        return self.storage.dequantized() + self.delta(), self.bias

    def saved(self) -> dict[str, Tensor]:
        a, b = self.factors()
        return super().saved() | {"lora_A": a.detach(), "lora_B": b.detach()}


class DoraLinear(LowRankLinear):
    """A frozen linear layer, its low-rank adapter and a magnitude for each output."""

    row_norms: Tensor

    def __init__(
        self, storage: Storage, bias: Tensor | None, adapter: LowRank, name: str, keys: DropoutKeys, **options: bool
    ) -> None:
        """Begin with the magnitudes that the weight has."""
        super().__init__(storage, bias, adapter, name, keys, **options)
        self.register_buffer("row_norms", storage.dequantized().norm(dim=1), persistent=False)
        self.lora_magnitude_vector = nn.Parameter(self.row_norms.clone())

    def product(self, x: Tensor, shape: torch.Size) -> Tensor:
        mask = self.mask(shape)
        gain = self.lora_magnitude_vector / self.norms(x.dtype)
        dropped = x if mask is None else _Dropped.apply(x, mask)  # type: ignore[no-untyped-call]
        y = low_rank(dropped, self.storage, None, self.lora_A, self.lora_B, self.scaling, None)
        y = scaled(y, gain, self.bias)
        # PEFT drops inputs of (g - 1) W as well as of A, but not of W.
        return y if mask is None else y + frozen(x - dropped, self.storage, None)

    @torch.no_grad()
    def norms(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Norm of each row of W + s B A, (outputs,) fp32, whose product with W is computed in `dtype`."""
        a, b = self.lora_A, self.lora_B * self.scaling
        cross = self.storage.product(a.to(dtype)).t().float()  # W A^T, (outputs, rank)
        squares = self.row_norms.square() + (b * (2 * cross + b @ (a @ a.t()))).sum(1)
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def merged(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().merged()
        gain = self.lora_magnitude_vector.detach() / weight.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        return weight * gain[:, None], bias


class ScaledLinear(AdaptedLinear):
    """A frozen linear layer whose inputs or outputs are scaled (IA3, Liu et al. 2022, arXiv:2205.05638)."""

    def __init__(self, storage: Storage, bias: Tensor | None, adapter: Scale, **options: bool) -> None:
        """Begin with factors of 1, (1, inputs) or (outputs, 1) as PEFT's."""
        super().__init__(storage, bias, **options)
        shape = (1, self.in_features) if adapter.of == "inputs" else (self.out_features, 1)
        self.of = adapter.of
        self.ia3_l = nn.Parameter(torch.ones(shape, device=storage.weight.device))

    def product(self, x: Tensor, shape: torch.Size) -> Tensor:
        factors = self.ia3_l.flatten()
        if self.of == "inputs":
            return frozen(scaled(x, factors, None), self.storage, self.bias)
        return scaled(frozen(x, self.storage, self.bias), factors, None)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        factors = self.ia3_l.detach()
        bias = (
            self.bias if self.bias is None or self.of == "inputs" else (self.bias * factors[:, 0]).to(self.bias.dtype)
        )
        return self.storage.dequantized() * factors, bias


def make(
    storage: Storage, bias: Tensor | None, adapter: Adapter | None, name: str, keys: DropoutKeys, *, transposed: bool
) -> AdaptedLinear:
    """The layer that computes a frozen weight with an adapter; `name` is the layer's in its model."""
    if adapter is None:
        return AdaptedLinear(storage, bias, transposed=transposed)
    if isinstance(adapter, Scale):
        return ScaledLinear(storage, bias, adapter, transposed=transposed)
    kind = DoraLinear if adapter.magnitude else LowRankLinear
    return kind(storage, bias, adapter, name, keys, transposed=transposed)


def frozen(x: Tensor, storage: Storage, bias: Tensor | None) -> Tensor:
    """X (N, inputs) times a frozen weight, plus the bias: (N, outputs). Keeps nothing for the backward pass."""
    y: Tensor = _Frozen.apply(x, storage, bias)  # type: ignore[no-untyped-call]
    return y


def low_rank(
    x: Tensor, storage: Storage, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, mask: DropoutMask | None
) -> Tensor:
    """The formulas at the top of this file, (N, inputs) -> (N, outputs)."""
    y: Tensor = _LowRank.apply(x, storage, bias, a, b, scaling, mask)  # type: ignore[no-untyped-call]
    return y


def scaled(x: Tensor, factors: Tensor, bias: Tensor | None) -> Tensor:
    """X (N, features) times fp32 factors (features,), plus the bias.

    It is x + x (factors - 1), as factors are near 1, where 16 bits could not tell 1 from 1.003.
    """
    y: Tensor = _Scaled.apply(x, factors, bias)  # type: ignore[no-untyped-call]
    return y


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor, bias: Tensor | None) -> Tensor:
        change = (factors - 1).to(x.dtype)
        ctx.save_for_backward(x, change)
        y = torch.addcmul(x, x, change)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, change = ctx.saved_tensors
        dy = grads[0]
        return torch.addcmul(dy, dy, change), (dy * x).sum(0, dtype=torch.float32), None


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, storage: Storage, bias: Tensor | None) -> Tensor:
        ctx.storage = storage
        return storage.product(x, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        limits.look()
        return ctx.storage.product_backward(grads[0]), None, None


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        storage: Storage,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        mask: DropoutMask | None,
    ) -> Tensor:
        y = storage.product(x, bias)
        dropped = x if mask is None else mask.masked(x)
        h = dropped @ a.to(x.dtype).t()
        if mask is not None:
            h.mul_(mask.scale)
        y.addmm_(h, b.to(x.dtype).t(), alpha=scaling)
        ctx.save_for_backward(x, a, b, h)
        ctx.storage, ctx.scaling, ctx.mask = storage, scaling, mask
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        limits.look()
        x, a, b, h = ctx.saved_tensors
        dy, mask = grads[0], ctx.mask
        dh = (dy @ b.to(dy.dtype)).mul_(ctx.scaling)
        db = (dy.t() @ h).float().mul_(ctx.scaling)
        if mask is not None:
            dh.mul_(mask.scale)
        dropped = x if mask is None else mask.masked(x)
        da = (dh.t() @ dropped).float()
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ctx.storage.product_backward(dy)
            if mask is None:
                dx.addmm_(dh, a.to(dy.dtype))
            else:
                dx.add_(mask.masked(dh @ a.to(dy.dtype)))
        return dx, None, None, da, db, None, None


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: DropoutMask) -> Tensor:
        ctx.mask = mask
        return mask.masked(x).mul_(mask.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.mask.masked(grads[0].contiguous()).mul_(ctx.mask.scale), None
