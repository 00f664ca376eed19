"""The border to PEFT: its config, its names and its file, so that any PEFT client reads what we write."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as tensors_from
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowres_ft import foreign
from lowres_ft.errors import BundleError
from lowres_ft.linear import FROZEN_HALVES, AdaptedLinear
from lowres_ft.methods.base import matches
from lowres_ft.model import Adapted
from lowres_ft.spec import shown

_PREFIX = "base_model.model."
_LARGEST = 1 << 20  # bytes of an adapter_config.json
_DECIDES = (
    *("peft_type", "task_type", "r", "lora_alpha", "use_dora", "use_rslora", "target_modules", "modules_to_save"),
    *("feedforward_modules", "fan_in_fan_out", "bias", "rank_pattern", "alpha_pattern", "auto_mapping"),
)
"""Keys by which PEFT decides what an adapter computes."""


def peft_tensors(adapted: Adapted) -> dict[str, Tensor]:
    """The tensors of a bundle under PEFT's names, contiguous and on the processor."""
    tensors = {name: tensor for name, tensor in adapted.tensors().items() if not name.endswith(FROZEN_HALVES)}
    for name in adapted.adapted:
        layer = adapted.model.get_submodule(name)
        assert isinstance(layer, AdaptedLinear)
        tensors |= {f"{name}.{part}": tensor for part, tensor in layer.saved().items()}
    return {_peft_name(name): tensor.cpu().contiguous() for name, tensor in tensors.items()}


def read_adapter(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter file under their names in the model.

    Raises:
        BundleError: The file cannot be read.
    """
    return {_own_name(name): tensor for name, tensor in read_tensors(path).items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        BundleError: The file cannot be read.
    """
    try:
        return tensors_from(path.read_bytes())
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from error


def _peft_name(name: str) -> str:
    return _PREFIX + (f"{name}.weight" if name.endswith((".lora_A", ".lora_B")) else name)


def _own_name(name: str) -> str:
    name = name.removeprefix(_PREFIX)
    return name.removesuffix(".weight") if name.endswith((".lora_A.weight", ".lora_B.weight")) else name


def peft_config(adapted: Adapted) -> dict[str, Any]:
    """The content of adapter_config.json."""
    layers = [adapted.model.get_submodule(name) for name in adapted.adapted]
    config = adapted.method.peft_config(
        adapted.adapted,
        base_model_name_or_path=adapted.base.name,
        revision=adapted.base.revision,
        task_type=adapted.task.peft_type,
        target_modules=_shortest_names(adapted),
        modules_to_save=list(adapted.heads),
        fan_in_fan_out=any(getattr(layer, "transposed", False) for layer in layers),
    )
    content: Mapping[str, Any] = config.to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}
    found: dict[str, Any] = json.loads(json.dumps(plain))
    return found


def read_config(path: Path) -> dict[str, Any]:
    """The content of an adapter_config.json, of which versions of PEFT know more or fewer keys.

    Raises:
        BundleError: It cannot be read.
    """
    return foreign.read_json(path, _LARGEST, BundleError)


def require_as_saved(adapted: Adapted, path: Path) -> None:
    """Refuse an adapter_config.json by which another program would compute something else.

    Raises:
        BundleError: It says something else than what the adapter was saved with.
    """
    expected, found = peft_config(adapted), read_config(path)
    for key in _DECIDES:
        as_usual = key not in found and not expected.get(key)  # another version of PEFT may not write it
        if key in expected and not as_usual and found.get(key) != expected[key]:
            raise BundleError(f"{path}: {key} is {shown(found.get(key))}, but the adapter has {shown(expected[key])}")


def _shortest_names(adapted: Adapted) -> list[str]:
    """Last parts of the adapted layers' names where these single them out by PEFT's rule, else whole names."""
    linears = [name for name, m in adapted.model.named_modules() if isinstance(m, nn.Linear | Conv1D | AdaptedLinear)]
    ends = {name.rpartition(".")[2] for name in adapted.adapted}
    if {name for name in linears if any(matches(name, end) for end in ends)} == set(adapted.adapted):
        return sorted(ends)
    return sorted(adapted.adapted)
