"""A ledger of tensors: which bytes are alive at once, and what is computed, seen operation by operation.

It is a mode of PyTorch's dispatcher that stands above fake tensors, which have shapes and dtypes but no memory. What a
real run would allocate and free, it counts; what depends on values it decides as the largest case would.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Kind = Literal["activations", "logits", "gradients", "work", "converted"]
"""What a step makes: in the forward pass, after it, for the optimizer, for the backward pass, from codes."""
_ATEN = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_SCALAR, _INDEX = _ATEN._local_scalar_dense.default, _ATEN.index.Tensor  # noqa: SLF001 (their only names)
_PUT = {
    _ATEN.index_put.default: torch.empty_like,
    _ATEN.index_put_.default: lambda into: into,
    _ATEN._index_put_impl_.default: lambda into: into,
}
_FUNCTIONS = {
    *("softmax", "softmax_backward_data", "log_softmax", "log_softmax_backward_data"),
    *("gelu", "gelu_backward", "silu", "silu_backward", "elu", "elu_backward", "mish", "mish_backward"),
    *(
        "sigmoid",
        "sigmoid_backward",
        "tanh",
        "tanh_backward",
        "exp",
        "erf",
        "sin",
        "cos",
        "log",
        "softplus",
        "softplus_backward",
    ),
    *("native_layer_norm", "native_layer_norm_backward", "native_group_norm", "native_group_norm_backward"),
    *("where", "masked_fill", "gather", "scatter", "scatter_add", "index_add", "embedding_dense_backward"),
}
"""Operations in which each number takes time, not only its bytes: many instructions, a choice, a place."""


class Cost(NamedTuple):
    """What an operation asks of a device."""

    flops: float
    moved: int
    """Bytes that it reads and writes."""
    function: bool = False
    """Whether a processor takes far longer for it than for its bytes."""


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts storages from their first sight until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kind: Kind | None = None  # None for what was there before a step
        self._forget()

    def _forget(self) -> None:
        self.alive: dict[int, tuple[Kind, int]] = {}
        self.sums: Counter[Kind] = Counter()
        self.most: Counter[Kind] = Counter()
        self.total = self.highest = 0
        self.sizes: Counter[int] = Counter()  # bytes that are alive, by the size of their storage
        self.blocks: Counter[int] = Counter()  # the same at the highest moment
        self.costs: Counter[Cost] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is _DEVICE and isinstance(args[0], FakeTensor):  # every other call, and nothing is computed
            return args[0].fake_device
        found = _decided(function, args)
        if found is None:
            found = function(*args, **(kwargs or {}))
        if self.kind is not None and function is not _DEVICE:
            self._note(function, args, kwargs or {}, found)
        return found

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Begin with nothing, and forget what is still alive at the end."""
        self._forget()
        try:
            yield
        finally:
            self._forget()

    @contextmanager
    def during(self, kind: Kind) -> Iterator[None]:
        """Call what is made inside `kind`."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def call(self, tensor: Tensor, kind: Kind) -> None:
        """Let bytes that are alive count as another kind."""
        key = _key(tensor)
        if key in self.alive:
            before, size = self.alive[key]
            self.alive[key] = kind, size
            self.sums[before] -= size
            self.sums[kind] += size

    def _note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any) -> None:
        made = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {_key(tensor) for tensor in given}
        made = [tensor for tensor in made if _key(tensor) not in known]  # others are views, or changed in their place
        if not function.is_view:
            count = flop_registry.get(function.overloadpacket)
            flops = count(*args, **kwargs, out_val=found) if count else 0
            name = function.overloadpacket.__name__.strip("_")
            self.costs[Cost(float(flops), sum(map(nbytes, (*given, *made))), name in _FUNCTIONS)] += 1
        for tensor in made:
            self._keep(tensor, "converted" if _converts(function, args) else self.kind)

    def _keep(self, tensor: Tensor, kind: Kind | None) -> None:
        storage = tensor.untyped_storage()
        key, size = _key(tensor), storage.nbytes()
        if kind is None or key in self.alive or not size:
            return
        self.alive[key] = kind, size
        self.sums[kind] += size
        self.sizes[size] += size
        self.total += size
        weakref.finalize(storage, self._free, key, self.alive)
        if self.total > self.highest:
            self.highest, self.most, self.blocks = self.total, self.sums.copy(), self.sizes.copy()

    def _free(self, key: int, among: dict[int, tuple[Kind, int]]) -> None:
        if among is not self.alive:  # of a count that is over
            return
        kind, size = self.alive.pop(key)
        self.sums[kind] -= size
        self.sizes[size] -= size
        self.total -= size


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def _key(tensor: Tensor) -> int:
    """What tells a storage from all others that are alive."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001


def _converts(function: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation makes weights of codes."""
    if function.namespace == "bitsandbytes":
        return True
    return function is _ATEN._to_copy.default and args[0].dtype == torch.int8  # noqa: SLF001


def _decided(function: Any, args: tuple[Any, ...]) -> Any:
    """What an operation gives whose result depends on values that are not known, as if all of a mask were wanted.

    None for any other.
    """
    if function is _SCALAR and getattr(args[0], "constant", None) is None:
        return 0.0 if args[0].is_floating_point() else 1
    if function is _INDEX and (mask := _mask(args[1])) is not None:
        assert len(args[1]) == 1
        return args[0].new_empty((mask.numel(), *args[0].shape[mask.dim() :]))
    make: Callable[[Tensor], Tensor] | None = _PUT.get(function)
    if make is not None and _mask(args[1]) is not None:
        return make(args[0])
    return None


def _mask(indices: list[Tensor | None]) -> Tensor | None:
    return next((index for index in indices if index is not None and index.dtype == torch.bool), None)
