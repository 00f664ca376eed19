"""Activations that are computed again in the backward pass, so that they need not be kept until then.

Where all of a layer is computed again, its input alone is kept (Chen et al. 2016, arXiv:1604.06174), for the time of
another forward pass. Where the selection is, the products of its frozen weights are kept too: they take most of the
time, and what lies between them (norms, activation functions, rotations, attention) most of the memory.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel

from lowres_ft import storage

Recompute = Literal["none", "layers", "selective"]
Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]
_CACHES = ("past_key_values", "layer_past")


def apply(model: PreTrainedModel, stack: str | None, how: Recompute) -> None:
    """Let each layer of `stack`, the name of a list of them, compute again what its backward pass needs."""
    if how == "none":
        return
    assert stack is not None
    options: dict[str, Any] = {"context_fn": _Products.contexts} if how == "selective" else {}
    for layer in model.get_submodule(stack).children():
        layer.forward = _recomputing(layer.forward, options)


def _recomputing(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """A layer's forward pass, through `checkpoint` where there will be a backward pass."""

    def call(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        # Computed twice, a layer would write twice into a cache of keys and values, which training has no use for.
        inputs = tuple(None if isinstance(one, Cache) else one for one in inputs)
        named |= {name: None for name in _CACHES if name in named}
        named |= {"use_cache": False} if "use_cache" in named else {}
        return checkpoint(forward, *inputs, use_reentrant=False, **options, **named)

    return call


class _Products:
    """The products of frozen weights in one call of a layer, in their order."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    @classmethod
    def contexts(cls) -> Contexts:
        """Contexts of the forward pass and of its repetition, as `checkpoint` wants them."""
        products = cls()
        return products._keeping(), products._giving_back()

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        def keep(compute: Callable[[], Tensor]) -> Tensor:
            found = compute()
            self.kept.append(found.clone())  # an adapter adds its update in place
            return found

        with storage.products(keep):
            yield

    @contextmanager
    def _giving_back(self) -> Iterator[None]:
        waiting = iter(self.kept)
        try:
            with storage.products(lambda _: next(waiting)):
                yield
        finally:
            self.kept.clear()
