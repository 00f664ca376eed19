"""Attention as products of batched matrices, which a processor does faster than PyTorch's fused kernel on short rows.

With q (T, D) for each head and k, v (S, D),

    p = softmax(s q k^T + mask),   o = p v,

and, as of any softmax, with dp = do v^T: ds = p (dp - rowsum(dp p)), dq = s ds k, dk = s ds^T q, dv = p^T do. Heads
that share keys and values (grouped queries) stand in the rows of one product. p holds T S numbers a head: of short rows
it is kept for the backward pass, of long ones made again, a part at a time that stays in the cache.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

Kernel = Literal["kept", "recomputed", "fused"]
"""Products with p kept or made again, or PyTorch's fused kernel."""

_WITHOUT_EFFECT = {
    *("is_causal", "position_ids", "cache_position", "sliding_window"),  # the mask says it
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "deterministic"),
}
"""What models pass on that changes nothing here; of anything else their own attention must know what it means."""
_IN_CACHE = 2**20  # numbers of p that are made again at once
_LADDER = (128, 256, 512, 1024, 2048)  # lengths that are timed
_WORTH_KEEPING = 0.85  # of the time of p made again: less gain is not worth the memory


@dataclass(frozen=True)
class Heads:
    """What the time of attention depends on, but for the length."""

    queries: int
    keys: int
    width: int


def implementation(kernels: Mapping[int, Kernel]) -> str:
    """Tell transformers of attention that takes the kernel of the first length that holds a row; return its name."""
    name = "_".join(["lowres", *(f"{kernel}_{length}" for length, kernel in sorted(kernels.items()))])

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        inputs = (query, key, value, attention_mask)
        dropout, scaling = options.pop("dropout", 0.0), options.pop("scaling", None)
        if dropout or any(options[option] is not None for option in options.keys() - _WITHOUT_EFFECT):
            eager = sys.modules[type(module).__module__].eager_attention_forward
            found: tuple[Tensor, Tensor] = eager(module, *inputs, dropout=dropout, scaling=scaling, **options)
            return found
        kernel = next((kernels[length] for length in sorted(kernels) if key.shape[2] <= length), "fused")
        if kernel == "fused":
            fused: tuple[Tensor, None] = sdpa_attention_forward(module, *inputs, scaling=scaling, **options)
            return fused
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return products(*inputs, scaling, keep=kernel == "kept"), None

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, eager_mask)
    return name


def products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, *, keep: bool) -> Tensor:
    """(B, H, T, D) queries, (B, G, S, D) keys and values, a mask to add, (B, 1, T, S): (B, T, H, D).

    Under autocast it computes in its dtype, also where rotary positions left queries and keys in fp32.
    """
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        query, key, value = (part.to(torch.get_autocast_dtype(kind)) for part in (query, key, value))
    if mask is not None and mask.dtype != query.dtype:  # -inf would make NaN of a row that sees nothing
        mask = mask.clamp_min(torch.finfo(query.dtype).min).to(query.dtype)
    with torch.autocast(kind, enabled=False):
        found: Tensor = _Products.apply(query, key, value, mask, scaling, keep)  # type: ignore[no-untyped-call]
    return found.transpose(1, 2)


def fastest(heads: Heads, dtype: torch.dtype, longest: int, tokens: int) -> dict[int, Kernel]:
    """Time the kernels, forward and backward, on rows of up to `longest` tokens, `tokens` at once.

    The shortest rows are not timed: p is so small there that keeping it always wins.
    """
    found: dict[int, Kernel] = {_LADDER[0]: "kept"}
    for length in _LADDER[1:]:
        if longest > length // 2:
            times = _times(heads, dtype, length, max(1, tokens // length))
            best = min(times, key=lambda kernel: times[kernel])
            if best == "kept" and times["kept"] > _WORTH_KEEPING * times["recomputed"]:
                best = "recomputed"
            found[length] = best
    return found


def _times(heads: Heads, dtype: torch.dtype, length: int, rows: int) -> dict[Kernel, float]:
    """Seconds of each kernel, the best of a few runs, which take turns."""
    shapes = [(rows, count, length, heads.width) for count in (heads.queries, heads.keys, heads.keys)]
    q, k, v = (torch.full(shape, 0.01, dtype=dtype, requires_grad=True) for shape in shapes)
    mask = torch.zeros(rows, 1, length, length, dtype=dtype)
    runs: dict[Kernel, Callable[[], Tensor]] = {
        "kept": lambda: products(q, k, v, mask, 1.0, keep=True),
        "recomputed": lambda: products(q, k, v, mask, 1.0, keep=False),
        "fused": lambda: scaled_dot_product_attention(q, k, v, mask, enable_gqa=heads.queries != heads.keys),
    }
    seconds: dict[Kernel, list[float]] = {kernel: [] for kernel in runs}
    for _ in range(3):
        for kernel, run in runs.items():
            began = time.perf_counter()
            run().sum().backward()  # type: ignore[no-untyped-call]
            seconds[kernel].append(time.perf_counter() - began)
    return {kernel: min(times) for kernel, times in seconds.items()}


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, keep: bool
    ) -> Tensor:
        count = key.shape[0] * key.shape[1]
        q = (query * scaling).reshape(count, -1, query.shape[-1])
        k, v = (part.reshape(count, -1, part.shape[-1]) for part in (key, value))
        parts = _Parts(q, k, mask, len(key), query.shape[2])
        o = q.new_empty(*q.shape[:2], v.shape[-1])
        kept = None
        for row, at in parts.whole() if keep else parts.of_the_cache():
            p = parts.p(row, at)
            torch.bmm(p, v[at], out=o[at])
            kept = p if keep else None
        ctx.save_for_backward(q, k, v, mask, kept)
        ctx.scaling, ctx.rows, ctx.shapes = scaling, parts.rows, (query.shape, key.shape, value.shape)
        return o.view(*query.shape[:3], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, kept = ctx.saved_tensors
        of_query, of_key, of_value = ctx.shapes
        parts = _Parts(q, k, mask, ctx.rows, of_query[2])
        do = grads[0].reshape(*q.shape[:2], v.shape[-1])
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for row, at in parts.of_the_cache() if kept is None else parts.whole():
            p = parts.p(row, at) if kept is None else kept
            torch.bmm(p.transpose(1, 2), do[at], out=dv[at])
            dp = torch.bmm(do[at], v[at].transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)  # noqa: SLF001 (softmax's own, in one pass)
            torch.bmm(ds, k[at], out=dq[at])
            torch.bmm(ds.transpose(1, 2), q[at], out=dk[at])
        return dq.mul_(ctx.scaling).view(of_query), dk.view(of_key), dv.view(of_value), None, None, None


@dataclass(frozen=True)
class _Parts:
    """What p is made of, one behind the other for batched products."""

    q: Tensor
    """(B G, H/G T, D), scaled."""
    k: Tensor
    """(B G, S, D)."""
    mask: Tensor | None
    """(B, 1, T, S)."""
    rows: int
    """B."""
    queries: int
    """T."""

    def p(self, row: slice, at: slice) -> Tensor:
        """Attention of the heads `at` (of B G), which are of the batch's `row`."""
        scores = torch.bmm(self.q[at], self.k[at].transpose(1, 2))
        if self.mask is not None:
            mask = self.mask[row]
            scores.view(len(mask), -1, self.queries, self.k.shape[1]).add_(mask)
        return torch.softmax(scores, -1)

    def whole(self) -> Iterator[tuple[slice, slice]]:
        """All at once."""
        yield slice(None), slice(None)

    def of_the_cache(self) -> Iterator[tuple[slice, slice]]:
        """Parts of one row of the batch whose p stays in the processor's cache."""
        groups = len(self.q) // self.rows
        step = max(1, _IN_CACHE // (self.q.shape[1] * self.k.shape[1]))
        for row in range(self.rows):
            for start in range(row * groups, (row + 1) * groups, step):
                yield slice(row, row + 1), slice(start, min(start + step, (row + 1) * groups))
