"""Weights as they are read: each tensor quantized or cast by itself, so that only what is kept takes memory.

transformers' `from_pretrained` finds which tensors of which files belong where: renamed, merged, tied, missing. A
quantizer of ours, registered there, gets each of them in turn.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowres_ft import embedding, profiles, quantize
from lowres_ft.recipe import ModelSpec
from lowres_ft.storage import Int8, Nf4

_NAME = "lowres_ft"


def options(spec: ModelSpec, device: str, keep: tuple[str, ...], dtype: torch.dtype) -> dict[str, Any]:
    """Options of `from_pretrained` that quantize every linear layer but those in `keep`, and cast the rest.

    Weights are quantized from the dtype of the files, so that their codes do not depend on what computes.
    """
    quantize.require_library(spec.quantize)
    return {"dtype": "auto", "device_map": {"": device}, "quantization_config": _Config(spec, device, keep, dtype)}


def forget(model: PreTrainedModel) -> None:
    """Leave nothing of the quantizer on a model that was read by it."""
    model.hf_quantizer.remove_quantization_config(model)


@register_quantization_config(_NAME)
class _Config(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not typed
    """What `_Reader` must know; transformers finds the one by the other."""

    def __init__(self, spec: ModelSpec, device: str, keep: tuple[str, ...], dtype: torch.dtype) -> None:
        self.quant_method = _NAME
        self.spec, self.device, self.keep, self.dtype = spec, torch.device(device), keep, dtype


@register_quantizer(_NAME)
class _Reader(HfQuantizer):  # type: ignore[misc]
    """Says what becomes of each tensor."""

    def __init__(self, config: _Config, **options: Any) -> None:
        super().__init__(config, **options)
        self.config = config
        self.shapes: dict[str, torch.Size] = {}
        self.rooms: dict[str, Int8 | Nf4] = {}
        self.single: frozenset[str] = frozenset()
        self.mismatched: set[str] = set()

    is_trainable = True

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        """Make room for all codes first: between weights that come and go, memory would be left in pieces."""
        self.shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
        self.single = kept_single(model, self.config.dtype)
        self.rooms = {
            f"{name}.weight": quantize.empty(shape(model.get_submodule(name)), form, self.config.device)
            for name, form in forms(model, self.config.spec, self.config.keep).items()
        }

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """Whether a tensor passes through `kept`; transformers compares no shapes of those that do."""
        return param_name in self.shapes and param_name not in self.mismatched

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes of an element that there is no room for yet; transformers reserves a GPU's memory by it."""
        return 0.0 if param_name in self.rooms else self.config.dtype.itemsize

    def get_quantize_ops(self) -> ConversionOps:
        return _Keep(self)

    def kept(self, model: PreTrainedModel, name: str, value: Tensor) -> Tensor:
        """What the model holds of a tensor that was read."""
        if value.shape != self.shapes[name]:
            self.mismatched.add(name)
        elif name in self.rooms:
            turned = isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
            quantize.fill(self.rooms[name], value.t() if turned else value)
            return quantize.parameter(self.rooms[name])
        elif value.is_floating_point():
            return value.to(torch.float32 if self.single.intersection(name.split(".")) else self.config.dtype)
        return value


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
