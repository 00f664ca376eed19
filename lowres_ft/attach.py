"""Adapters put into a loaded model, in the place of its linear layers, and heads that are trained whole."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowres_ft import linear, profiles, quantize
from lowres_ft.dropout import DropoutKeys
from lowres_ft.errors import ModelError
from lowres_ft.linear import AdaptedLinear, LowRankLinear
from lowres_ft.methods.base import Adapter, LowRank, Method
from lowres_ft.storage import Plain, Storage


def attach(
    model: PreTrainedModel,
    method: Method,
    heads: tuple[str, ...],
    keys: DropoutKeys,
    *,
    new: bool,
    after: Callable[[], None] = lambda: None,
) -> tuple[str, ...]:
    """Replace the layers that are adapted or quantized; return the names of those adapted.

    An adapter that is not `new` takes the form in which a bundle holds it. `after` each layer something may be done.
    """
    modules = dict(profiles.linear_layers(model, heads))
    linears = tuple(profiles.Linear(name, *profiles.widths(module)) for name, module in modules.items())
    chosen = profiles.targets(method, linears)
    for name, module in modules.items():
        held = quantize.storage(module)
        adapter = method.adapter(name) if name in chosen else None
        if adapter is not None and not new:
            adapter = adapter.saved()
        if held is not None or adapter is not None:
            model.set_submodule(name, _replaced(module, held, name, adapter, keys))
            after()
    return chosen


def _replaced(
    module: nn.Module, held: Storage | None, name: str, adapter: Adapter | None, keys: DropoutKeys
) -> AdaptedLinear:
    """A layer with an adapter that computes what `module` does, whose weight is `held` where it is quantized."""
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)
    transposed = issubclass(getattr(module, "source_cls", type(module)), Conv1D)  # bitsandbytes' layers name theirs
    return linear.make(held or Plain(weight(module)), bias, adapter, name, keys, transposed=transposed)


def weight(module: nn.Module) -> Tensor:
    """The weight (outputs, inputs) of a plain linear layer."""
    held = module.weight
    assert isinstance(held, Tensor)
    return held.t().contiguous() if isinstance(module, Conv1D) else held


def begin(
    model: PreTrainedModel,
    method: Method,
    chosen: tuple[str, ...],
    originals: Mapping[str, Tensor],
    after: Callable[[], None] = lambda: None,
) -> None:
    """Let new adapters begin where their method says; `originals` are the weights before they were quantized."""
    for name in chosen:
        layer, adapter = model.get_submodule(name), method.adapter(name)
        if not isinstance(layer, LowRankLinear) or not isinstance(adapter, LowRank) or adapter.init == "default":
            continue
        held = layer.storage.dequantized()
        if adapter.init == "pissa":
            layer.begin_with(held)
            layer.take_back()
        else:
            layer.begin_with(originals[name].to(held) - held)
        after()


def train_heads(model: PreTrainedModel, heads: tuple[str, ...]) -> None:
    """Train the heads in fp32, whatever the base does.

    Raises:
        ModelError: PEFT could not tell a head from another module.
    """
    _require_distinct(model, heads)
    for head in heads:
        module = model.get_submodule(head).requires_grad_(True)
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.float()  # in their place, as `Module.float` cannot with fake tensors
        module.register_forward_pre_hook(_to_float32)


def _require_distinct(model: PreTrainedModel, heads: tuple[str, ...]) -> None:
    """PEFT restores every module whose name ends in a head's name: no other module may."""
    for name, _ in model.named_modules():
        for head in heads:
            if name.endswith(head) and not any(f"{name}.".startswith(f"{other}.") for other in heads):
                raise ModelError(f"PEFT cannot tell the head '{head}' from the module '{name}' of this base")


def _to_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A head's inputs in fp32."""
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def dequantize(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Hold each quantized weight as the plain one that it computes with."""
    for layer in model.modules():
        if isinstance(layer, AdaptedLinear):
            layer.storage = Plain(layer.storage.dequantized(dtype))


def fold(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make each layer that was replaced a plain one."""
    for name, layer in [(name, m) for name, m in model.named_modules() if isinstance(m, AdaptedLinear)]:
        folded, bias = layer.merged()
        plain: nn.Module
        if layer.transposed:
            plain = Conv1D(layer.out_features, layer.in_features)
            folded = folded.t().contiguous()
        else:
            plain = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
        plain.weight = nn.Parameter(folded.to(dtype), requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias, requires_grad=False)
        model.set_submodule(name, plain)
