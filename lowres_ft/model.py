"""The model of an experiment: loaded, adapted, and merged back into a plain one."""

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowres_ft import (
    allocator,
    attach,
    attention,
    behaviour,
    embedding,
    mapped,
    profiles,
    quantize,
    reading,
    recompute,
    storage,
    streaming,
    weights,
)
from lowres_ft.bases import Base
from lowres_ft.dropout import DropoutKeys
from lowres_ft.errors import ModelError, first_line
from lowres_ft.linear import FROZEN_HALVES
from lowres_ft.mapped import Block
from lowres_ft.methods.base import Method
from lowres_ft.plan import Plan
from lowres_ft.profiles import Profile
from lowres_ft.reading import Passing
from lowres_ft.recipe import Recipe
from lowres_ft.shortage import Room
from lowres_ft.streaming import Stream
from lowres_ft.tasks.base import Task
from lowres_ft.tokenizing import load_tokenizer

_DROPOUT = re.compile(r"dropout|pdrop", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Adapted:
    """A loaded model, ready to train or to predict."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    method: Method
    base: Base
    heads: tuple[str, ...]
    """Modules that are trained and saved whole, beside the adapters."""
    adapted: tuple[str, ...]
    keys: DropoutKeys
    dtype: torch.dtype
    parameters: int
    """Of the whole model, adapters not counted."""
    cleaners: tuple[str, ...]
    stream: Stream | None = None
    """Where frozen layers pass through room for two of them: what brings them."""
    room: Room = field(default_factory=Room)
    """What of it turned out to fit into memory."""

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    def computing(self) -> AbstractContextManager[Any]:
        """The context in which the model is called: autocast where fp32 weights compute in 16 bits."""
        if self.method.trains_base and self.dtype != torch.float32:
            return torch.autocast(self.device.type, self.dtype)
        return nullcontext()

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by their names in the model."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def tensors(self) -> dict[str, Tensor]:
        """What a bundle holds: the adapters and the heads (with their buffers), by their names in the model."""
        found: dict[str, Tensor] = dict(self.trained())
        found |= {name: b for name, b in self.model.named_buffers() if name.endswith(FROZEN_HALVES)}
        for head in self.heads:
            found |= {f"{head}.{name}": t for name, t in self.model.get_submodule(head).state_dict().items()}
        return {name: tensor.detach() for name, tensor in found.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put tensors back that `tensors()` gave.

        Raises:
            ModelError: Names or shapes are not those of this model.
        """
        own = self.tensors()
        if wrong := sorted(own.keys() ^ tensors.keys()):
            missing = "missing" if wrong[0] in own else "unknown"
            raise ModelError(f"{len(wrong)} tensors do not belong to this model, such as {wrong[0]} ({missing})")
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise ModelError(f"{name} has the shape {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}")
            tensor.copy_(tensors[name])


class Loaded(NamedTuple):
    """A base with the head of a task, before anything is added."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    heads: tuple[str, ...]
    blocks: tuple[Block, ...] = ()
    """Of a model whose layers will pass: where they lie, and its words."""


def load(
    recipe: Recipe,
    base: Base,
    profile: Profile,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    new: bool = True,
) -> Adapted:
    """Load a base with the head of the recipe's task, whose labels are known, and add what the method trains.

    Frozen weights are held in the plan's dtype or quantized; adapters and heads in fp32. New weights follow
    from the seed; those of a model that is not `new` are to be restored from a bundle.

    Raises:
        ModelError: The base cannot be loaded or adapted as asked.
    """
    allocator.settle(profile.hidden)
    tokenizer = tokenizer or load_tokenizer(base.folder)
    recipe.task.prepare(tokenizer)
    adapted = adapt(recipe, base, profile, plan, _load_model(recipe, base, profile, plan, tokenizer), new=new)
    behaviour.require(adapted)
    return adapted


def adapt(recipe: Recipe, base: Base, profile: Profile, plan: Plan, loaded: Loaded, *, new: bool = True) -> Adapted:
    """Add to a base whose weights are there what the method trains, in place.

    Raises:
        ModelError: It cannot be adapted as asked.
    """
    model, tokenizer, heads, blocks = loaded
    dtype = getattr(torch, plan.dtype)
    keys = DropoutKeys(recipe.train.seed)
    give_back = partial(mapped.drop, blocks)
    model.requires_grad_(recipe.method.trains_base)
    chosen: tuple[str, ...] = ()
    if not recipe.method.trains_base:
        kept = (*profile.outside, *heads)
        chosen = attach.attach(model, recipe.method, kept, keys, new=new, after=give_back)
        if new:
            originals = _originals(recipe, base, plan, kept) if recipe.method.corrects_quantization else {}
            attach.begin(model, recipe.method, chosen, originals, give_back)
        attach.train_heads(model, heads)
    if recipe.model.quantize_embeddings:
        embedding.hold(model, dtype)
    storage.use(model, plan.int8)
    recompute.apply(model, profile.stack, plan.recompute)
    stream = streaming.begin(model, profile.stack, plan.device, blocks) if plan.offload == "layers" else None
    model.train(recipe.model.dropout > 0)
    known = (recipe.task, recipe.method, base, heads, chosen, keys, dtype, profile.parameters)
    return Adapted(model, tokenizer, *known, recipe.data.clean, stream)


def _originals(recipe: Recipe, base: Base, plan: Plan, heads: tuple[str, ...]) -> dict[str, Tensor]:
    """The fp32 weights (outputs, inputs) of the base's linear layers before they are quantized."""
    changes = {"quantize": "none", "quantize_embeddings": False}
    plain = recipe.model_copy(update={"model": recipe.model.model_copy(update=changes)})
    model, *_ = _from_files(plain, base, plan, profiles.config(base, recipe.task), heads, torch.float32)
    return {name: attach.weight(module) for name, module in profiles.linear_layers(model, heads)}


def dequantize(adapted: Adapted) -> None:
    """Hold the weights that the quantized base computes with as plain ones, in place."""
    _end_stream(adapted)
    attach.dequantize(adapted.model, adapted.dtype)


def merge(adapted: Adapted) -> None:
    """Fold each adapter into its weight, in place: afterwards the model is a plain one of transformers."""
    _end_stream(adapted)
    attach.fold(adapted.model, adapted.dtype)


def _end_stream(adapted: Adapted) -> None:
    """Let all weights be used at any time."""
    if adapted.stream is not None:
        adapted.stream.end()


def _load_model(recipe: Recipe, base: Base, profile: Profile, plan: Plan, tokenizer: PreTrainedTokenizerBase) -> Loaded:
    """The model and the names of its heads: the task's, and every module that the files did not fill."""
    task = recipe.task
    config = profiles.config(base, task)
    # The model must look for the very token that pads: a decoder classifies by the last one that is another.
    config.get_text_config().pad_token_id = config.pad_token_id = tokenizer.pad_token_id
    if not task.generates and hasattr(config.get_text_config(), "use_cache"):
        config.get_text_config().use_cache = False  # of keys and values, which no other word will ask for
    if recipe.model.dropout:
        for field, value in vars(config).items():
            if _DROPOUT.search(field) and isinstance(value, int | float) and not isinstance(value, bool):
                setattr(config, field, recipe.model.dropout)
    dtype = torch.float32 if recipe.method.trains_base else getattr(torch, plan.dtype)
    passing = Passing.of(recipe, profile) if plan.offload == "layers" else None
    model, new, blocks = _from_files(recipe, base, plan, config, profile.outside, dtype, passing)
    if not task.new_head and new:
        raise ModelError(
            f"{base.source} brings no {', '.join(new)} of its own, which {task.kind} needs",
            hint="Use a whole language model, as it was published.",
        )
    if set(new) - set(profile.heads) and recipe.model.quantize != "none":
        # A module that the files do not fill must not be quantized, and only loading tells which those are.
        del model
        model, new, blocks = _from_files(recipe, base, plan, config, (*profile.outside, *new), dtype, passing)
    if (size := model.get_input_embeddings().weight.shape[0]) < len(tokenizer):
        raise ModelError(f"{base.folder}: the tokenizer has {len(tokenizer)} tokens, but the model only {size}")
    if recipe.model.quantize == "none" and passing is None:
        model.to(plan.device)  # a quantized one was read onto its device
    return Loaded(model, tokenizer, (*profile.heads, *(name for name in new if name not in profile.heads)), blocks)


def _from_files(
    recipe: Recipe,
    base: Base,
    plan: Plan,
    config: Any,
    keep: tuple[str, ...],
    dtype: torch.dtype,
    passing: Passing | None = None,
) -> tuple[PreTrainedModel, tuple[str, ...], tuple[Block, ...]]:
    """Load the weights; return the model, the outermost modules that were newly made, and where its layers lie."""
    options = _options(recipe, base, plan, config, keep, dtype, passing)
    torch.manual_seed(recipe.train.seed)
    try:
        with profiles.quiet(), weights.unmapped(for_a_moment=passing is not None):
            model, report = profiles.auto_class(recipe.task).from_pretrained(
                base.folder,
                config=config,
                attn_implementation=attention_name(plan),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=False,
                **options,
            )
    except (ValueError, OSError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        raise ModelError(f"{base.source} cannot be loaded for {recipe.task.kind}: {first_line(error)}") from error
    blocks = reading.blocks(model)
    if recipe.model.quantize != "none" or passing is not None:
        _cast(model, dtype)
    mismatched = {key for key, *_ in report["mismatched_keys"]}
    return model, _outermost(model, {*report["missing_keys"], *mismatched}, mismatched, base), blocks


def attention_name(plan: Plan) -> str:
    """What transformers calls the plan's attention."""
    return plan.attention if plan.attention != "products" else attention.implementation(plan.attention_kernels)


def _options(
    recipe: Recipe,
    base: Base,
    plan: Plan,
    config: Any,
    keep: tuple[str, ...],
    dtype: torch.dtype,
    passing: Passing | None,
) -> dict[str, Any]:
    """Options of `from_pretrained` that quantize as the recipe says, where the files do not hold codes already."""
    wanted, held = recipe.model.quantize, quantize.form_of(config)
    if held is None:
        if wanted == "none" and passing is None:
            return {"dtype": dtype}
        return reading.options(recipe.model, plan.device, keep, dtype, passing)
    if held != wanted:
        raise ModelError(
            f"{base.source} holds its weights in {held} already, so model.quantize={wanted} cannot be",
            hint=f"Use model.quantize={held}, or the base that it was made from.",
        )
    quantize.require_library(held)
    return {"dtype": "auto", "device_map": {"": plan.device if passing is None else "cpu"}}


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Hold what is not quantized in `dtype`, as far as it was not read so, and forget how it was read."""
    if model.hf_quantizer is not None and not model.hf_quantizer.pre_quantized:
        reading.forget(model)
    kept = reading.kept_single(model, dtype)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not kept.intersection(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _outermost(model: PreTrainedModel, missing: set[str], mismatched: set[str], base: Base) -> tuple[str, ...]:
    """The modules to which missing weights belong: the task's heads, and a pooler of the base.

    Raises:
        ModelError: Anything else of the base is missing or of another shape, so the files are not this model's.
    """
    found: dict[str, None] = {}
    prefix = model.base_model_prefix
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for key in sorted(missing - tied):
        parts = key.split(".")
        inside = parts[0] == prefix
        name = ".".join(parts[:2] if inside else parts[:1])
        if inside and (key in mismatched or "pool" not in parts[1]):
            how = "hold another shape of" if key in mismatched else "lack"
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ModelError(
                f"{base.folder}: the weights {how} {key}{more}, so they are not this model's",
                hint="Is it the folder of another architecture, an edited config.json, or a broken download?",
            )
        found[name] = None
    return tuple(found)
