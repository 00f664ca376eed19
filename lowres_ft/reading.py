"""Weights as they are read: each tensor quantized or cast by itself, so that only what is kept takes memory.

transformers' `from_pretrained` finds which tensors of which files belong where: renamed, merged, tied, missing. A
quantizer of ours, registered there, gets each of them in turn.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowres_ft import embedding, mapped, profiles, quantize
from lowres_ft.mapped import Block, Need
from lowres_ft.parts import ModelSpec
from lowres_ft.profiles import Profile
from lowres_ft.recipe import Recipe
from lowres_ft.storage import Int8, Nf4

_NAME = "lowres_ft"
_PART = 2**23  # bytes of a weight that are written to a file at once


@dataclass(frozen=True)
class Passing:
    """What of a model is read into a mapped file, as its layers will pass through memory."""

    stack: str
    """Name of the list of layers."""
    turned: frozenset[str]
    """Layers that are adapted: a weight (inputs, outputs) of one is held as (outputs, inputs)."""

    @classmethod
    def of(cls, recipe: Recipe, profile: Profile) -> "Passing":
        """That of a recipe, whose plan lets layers pass."""
        assert profile.stack is not None
        adapted = profiles.targets(recipe.method, profile.linears) if recipe.model.quantize == "none" else ()
        return cls(profile.stack, frozenset(adapted))


def options(
    spec: ModelSpec, device: str, keep: tuple[str, ...], dtype: torch.dtype, passing: Passing | None = None
) -> dict[str, Any]:
    """Options of `from_pretrained` that quantize every linear layer but those in `keep`, and cast the rest.

    Weights are quantized from the dtype of the files, so that their codes do not depend on what computes. Those of a
    model whose layers pass are quantized on their device, and held by the processor.
    """
    if spec.quantize != "none":
        quantize.require_library(spec.quantize)
    return {
        "dtype": dtype if spec.quantize == "none" else "auto",
        "device_map": {"": device if passing is None else "cpu"},
        "quantization_config": _Config(spec, device, keep, dtype, passing),
    }


def blocks(model: PreTrainedModel) -> tuple[Block, ...]:
    """The mapped parts of a file that hold the layers of a model in their order, and then its words."""
    return tuple(getattr(getattr(model, "hf_quantizer", None), "blocks", ()))


def forget(model: PreTrainedModel) -> None:
    """Leave nothing of the quantizer on a model that was read by it."""
    model.hf_quantizer.remove_quantization_config(model)


@register_quantization_config(_NAME)
class _Config(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not typed
    """What `_Reader` must know; transformers finds the one by the other."""

    def __init__(
        self, spec: ModelSpec, device: str, keep: tuple[str, ...], dtype: torch.dtype, passing: Passing | None
    ) -> None:
        self.quant_method = _NAME
        self.spec, self.device, self.keep, self.dtype = spec, torch.device(device), keep, dtype
        self.passing = passing


@register_quantizer(_NAME)
class _Reader(HfQuantizer):  # type: ignore[misc]
    """Says what becomes of each tensor."""

    def __init__(self, config: _Config, **options: Any) -> None:
        super().__init__(config, **options)
        self.config = config
        self.shapes: dict[str, torch.Size] = {}
        self.rooms: dict[str, Int8 | Nf4 | Tensor] = {}
        self.blocks: list[Block] = []
        self.single: frozenset[str] = frozenset()
        self.mismatched: set[str] = set()

    is_trainable = True

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        """Make room for all codes first: between weights that come and go, memory would be left in pieces."""
        self.shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
        self.single = kept_single(model, self.config.dtype)
        found = forms(model, self.config.spec, self.config.keep) if self.config.spec.quantize != "none" else {}
        device = self.config.device if self.config.passing is None else torch.device("cpu")
        mapped_ones = self._mapped(model, found) if self.config.passing is not None else {}
        self.rooms = mapped_ones | {
            f"{name}.weight": quantize.empty(shape(model.get_submodule(name)), form, device)
            for name, form in found.items()
            if f"{name}.weight" not in mapped_ones
        }

    def _mapped(self, model: PreTrainedModel, found: dict[str, str]) -> dict[str, Int8 | Nf4 | Tensor]:
        """Rooms in a mapped file: a block for each layer, and one for words."""
        assert self.config.passing is not None
        groups = list(_groups(model, self.config.passing.stack))
        needed: list[list[Need]] = []
        for names in groups:
            needed.append([])
            for name in names:
                self._room(model, name, found, lambda dtype, *sizes: _noted(needed[-1], dtype, sizes))
        self.blocks = mapped.blocks(needed)
        rooms = {}
        for block, names in zip(self.blocks, groups, strict=True):
            for name in names:
                rooms[name] = self._room(
                    model,
                    name,
                    found,
                    lambda dtype, *sizes, block=block: block.tensor(Need(torch.Size(sizes), dtype)),
                )
        return rooms

    def _room(
        self, model: PreTrainedModel, name: str, found: dict[str, str], make: quantize.Make
    ) -> Int8 | Nf4 | Tensor:
        """Need for a parameter, of tensors that `make` makes."""
        owner = name.rpartition(".")[0]
        if owner in found and name.endswith(".weight"):
            return quantize.held_in(shape(model.get_submodule(owner)), found[owner], make)
        dtype = self._dtype(name)
        assert self.config.passing is not None
        if owner in self.config.passing.turned and isinstance(model.get_submodule(owner), Conv1D):
            return make(dtype, *reversed(self.shapes[name])).t()
        return make(dtype, *self.shapes[name])

    def _dtype(self, name: str) -> torch.dtype:
        """What a parameter is held in that is not quantized."""
        return torch.float32 if self.single.intersection(name.split(".")) else self.config.dtype

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """Whether a tensor passes through `kept`; transformers compares no shapes of those that do."""
        return param_name in self.shapes and param_name not in self.mismatched

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes of an element that there is no room for yet; transformers reserves a GPU's memory by it."""
        return 0.0 if param_name in self.rooms or self.config.passing else self.config.dtype.itemsize

    def get_quantize_ops(self) -> ConversionOps:
        return _Keep(self)

    def kept(self, model: PreTrainedModel, name: str, value: Tensor) -> Tensor:
        """What the model holds of a tensor that was read."""
        room = self.rooms.get(name)
        if value.shape != self.shapes[name]:
            self.mismatched.add(name)
        elif isinstance(room, Tensor):
            self._leave(room)
            return self._filled(room, value)
        elif room is not None:
            self._leave(room.weight)
            turned = isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
            value = value.to(self.config.device)
            quantize.fill(room, value.t() if turned else value)
            return quantize.parameter(room)
        elif value.is_floating_point():
            return value.to(self._dtype(name))
        return value

    def _filled(self, room: Tensor, value: Tensor) -> Tensor:
        """A room in a file with the values of a tensor, a part at once: the pages of each go before the next."""
        to, of = (room, value) if room.is_contiguous() else (room.t(), value.t())
        rows = max(1, _PART * len(to) // max(1, to.numel() * to.element_size()))
        for begin in range(0, len(to), rows):
            to[begin : begin + rows].copy_(of[begin : begin + rows])
            mapped.drop([block for block in self.blocks if block.place(room) is not None])
        return room

    def _leave(self, room: Tensor) -> None:
        """Give back the pages of all blocks but that in which room is filled now."""
        mapped.drop([block for block in self.blocks if block.place(room) is None])


def _groups(model: PreTrainedModel, stack: str) -> Iterator[list[str]]:
    """Names of the matrices of each layer in the order of the layers, and then of those of words."""
    matrices = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    for at, _ in enumerate(model.get_submodule(stack).children()):
        yield [name for name in matrices if name.startswith(f"{stack}.{at}.")]
    words = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    tied = set(model.all_tied_weights_keys or ())
    yield [name for name in matrices if id(model.get_submodule(name.rpartition(".")[0])) in words and name not in tied]


def _noted(rooms: list[Need], dtype: torch.dtype, sizes: tuple[int, ...]) -> Tensor:
    """A tensor without memory; the room that it would need is noted."""
    rooms.append(Need(torch.Size(sizes), dtype))
    return torch.empty(sizes, dtype=dtype, device="meta")


class _Keep(ConversionOps):  # type: ignore[misc]
    """Hands each tensor to a reader."""

    def __init__(self, reader: _Reader) -> None:
        self.reader = reader

    def convert(
        self, input_dict: dict[str, Any], *_: Any, model: PreTrainedModel | None = None, **__: Any
    ) -> dict[str, Tensor]:
        assert model is not None
        found = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        return {name: self.reader.kept(model, name, value) for name, value in found.items()}


def forms(model: PreTrainedModel, spec: ModelSpec, keep: tuple[str, ...]) -> dict[str, str]:
    """The layers of a model that are quantized, but for those in `keep`, each with its format."""
    # Layers that overflow in fp16 are not quantized either, as by other programs.
    never = set(model._keep_in_fp32_modules or ())  # noqa: SLF001
    names = [name for name, _ in profiles.linear_layers(model, keep) if not never.intersection(name.split("."))]
    found: dict[str, str] = dict.fromkeys(names, spec.quantize)
    if spec.quantize_embeddings:
        tied = set(model.all_tied_weights_keys or ())
        found |= {name: "int8" for name in embedding.layers(model) if f"{name}.weight" not in tied}
    return found


def shape(module: nn.Module) -> torch.Size:
    """(outputs, inputs) of a layer's weight."""
    held = module.weight
    assert isinstance(held, Tensor)
    return held.t().shape if isinstance(module, Conv1D) else held.shape


def kept_single(model: PreTrainedModel, dtype: torch.dtype) -> frozenset[str]:
    """Parts of names of the modules that transformers keeps in fp32 where `dtype` computes."""
    kept = set(model._keep_in_fp32_modules_strict or ())  # noqa: SLF001
    if dtype == torch.float16:
        kept.update(model._keep_in_fp32_modules or ())  # noqa: SLF001
    return frozenset(kept)
