"""What is known of a base before a weight is read: its layers, its heads, and what a method would adapt."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from lowres_ft.bases import Base
from lowres_ft.errors import ModelError, first_line
from lowres_ft.methods.base import Method
from lowres_ft.tasks.base import Task

_MOST = {re.compile(r"(layers?|blocks|depth)$"): 1000, re.compile(r"(heads?|experts)$"): 10_000}
"""More than any model has of what a key of config.json counts."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of the base."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Profile:
    """What is known of a model without reading a weight."""

    linears: tuple[Linear, ...]
    """Linear layers of the base, heads not among them."""
    heads: tuple[str, ...]
    """Outermost modules of the task's head, which are made anew."""
    outside: tuple[str, ...]
    """Outermost modules with parameters outside the base: the heads, or a language model's output layer."""
    head_parameters: int
    parameters: int
    layers: int
    stack: str | None
    """Name of the list of its layers; None where it has none of that length."""
    hidden: int
    attention_heads: int
    vocabulary: int
    positions: int | None
    """Longest text that the base can take, in tokens; None where positions are computed, not learned."""
    key_value_heads: int
    head_width: int
    fused_attention: bool
    """True where transformers' model can use PyTorch's fused attention."""
    own_attention: bool
    """True where transformers' model can use an attention of ours."""


def profile(base: Base, task: Task) -> Profile:
    """Look at a base with the task's head, on the meta device.

    Raises:
        ModelError: transformers has no model of that kind for the task.
    """
    settings = config(base, task)
    if task.generates:
        _require_writer(base, settings)
    with torch.device("meta"), quiet():
        model = _built(task, settings, base)
    outside = outside_names(model)
    heads = outside if task.new_head else ()
    linears = tuple(Linear(name, *widths(module)) for name, module in linear_layers(model, outside))
    text = settings.get_text_config()
    hidden, heads_of_queries = int(getattr(text, "hidden_size", 0)), int(getattr(text, "num_attention_heads", 0))
    return Profile(
        linears=linears,
        heads=heads,
        outside=outside,
        head_parameters=sum(p.numel() for head in heads for p in model.get_submodule(head).parameters()),
        parameters=sum(p.numel() for p in model.parameters()),
        layers=int(getattr(text, "num_hidden_layers", 0)),
        stack=_stack(model, int(getattr(text, "num_hidden_layers", 0))),
        hidden=hidden,
        attention_heads=heads_of_queries,
        key_value_heads=int(getattr(text, "num_key_value_heads", None) or heads_of_queries),
        head_width=int(getattr(text, "head_dim", None) or hidden // max(1, heads_of_queries)),
        vocabulary=int(getattr(text, "vocab_size", 0)),
        positions=_positions(model),
        fused_attention=bool(model._supports_sdpa),  # noqa: SLF001 (there is no public name for it)
        own_attention=bool(model._supports_attention_backend),  # noqa: SLF001
    )


def _require_writer(base: Base, settings: Any) -> None:
    """Refuse an encoder: its language model sees the words that it is to write."""
    encoders = transformers.models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if settings.model_type in encoders and not getattr(settings, "is_decoder", False):
        raise ModelError(
            f"{base.source} (model_type {settings.model_type!r}) fills gaps in a text and does not write one",
            hint="Chat needs a language model that was trained to chat, such as starter:smollm2-135m.",
        )


def _built(task: Task, settings: Any, base: Base) -> PreTrainedModel:
    try:
        model = auto_class(task).from_config(settings, trust_remote_code=False)
    except Exception as error:  # what a config holds is anyone's
        raise ModelError(f"{base.source} cannot be used for {task.kind}: {first_line(error)}") from error
    if not hasattr(model, model.base_model_prefix):
        raise ModelError(f"{base.source}: {type(model).__name__} has no base to fine-tune beside its head")
    return model


def _positions(model: PreTrainedModel) -> int | None:
    """Rows of a learned table of positions, less those that RoBERTa and OPT leave before the first one."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(("position_embeddings", "wpe", "embed_positions")):
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - max(before, int(getattr(module, "offset", 0)))
    return None


def _stack(model: PreTrainedModel, count: int) -> str | None:
    """Name of the list of `count` modules that hold the most of a model."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    held = {name: sum(parameter.numel() for parameter in module.parameters()) for name, module in lists}
    return max(held, key=held.__getitem__, default=None)


def require_length(profile: Profile, task: Task) -> None:
    """Refuse texts that are longer than the base can take.

    Raises:
        ModelError: `task.max_length` is beyond the base's learned positions.
    """
    if profile.positions is not None and task.max_length > profile.positions:
        raise ModelError(
            f"task.max_length is {task.max_length}, but this base has positions for {profile.positions} tokens",
            hint=f"Use task.max_length={profile.positions} or less.",
        )


def targets(method: Method, linears: tuple[Linear, ...]) -> tuple[str, ...]:
    """Names of the linear layers that a method adapts.

    Raises:
        ModelError: The method's fields do not fit them.
    """
    return method.choose([linear.name for linear in linears])


def trainable(method: Method, profile: Profile) -> int:
    """How many parameters a method trains."""
    if method.trains_base:
        return profile.parameters
    count = profile.head_parameters
    chosen = set(targets(method, profile.linears))
    for linear in profile.linears:
        adapter = method.adapter(linear.name) if linear.name in chosen else None
        count += 0 if adapter is None else adapter.parameters(linear.inputs, linear.outputs)
    return count


def config(base: Base, task: Task) -> Any:
    """The config of a base with the task's fields in it.

    Raises:
        ModelError: transformers does not know that kind of model.
    """
    _require_countable(base)
    try:
        return AutoConfig.from_pretrained(base.folder, trust_remote_code=False, **task.model_config_fields())
    except Exception as error:  # what a config holds is anyone's
        kind = base.config().get("model_type")
        raise ModelError(
            f"{base.source}: transformers {transformers.__version__} cannot read its config (model_type {kind!r})",
            hint="A newer transformers may know it; code that comes with a model is never run.",
        ) from error


def _require_countable(base: Base) -> None:
    """Refuse numbers of layers and the like that no model has, before objects are made for them."""
    content = base.config()
    inner = [value for value in content.values() if isinstance(value, dict)]
    for key, value in (item for part in (content, *inner) for item in part.items()):
        most = next((most for counted, most in _MOST.items() if counted.search(key)), None)
        if most is not None and isinstance(value, int | float) and value > most:
            raise ModelError(f"{base.source}: {key} is {value:,} in config.json, which no model has")


def auto_class(task: Task) -> Any:
    """The class of transformers that makes the task's model."""
    return getattr(transformers, task.model_class)


def outside_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Outermost modules outside the base that hold parameters."""
    prefix = model.base_model_prefix
    return tuple(name for name, m in model.named_children() if name != prefix and any(True for _ in m.parameters()))


def linear_layers(model: PreTrainedModel, keep: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of a model but for those in the modules to `keep`, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and not any(f"{name}.".startswith(f"{kept}.") for kept in keep):
            yield name, module


def widths(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load report off the terminal: what they say is checked here."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
