"""IA3: learned factors of keys, values and inner activations (Liu et al. 2022, arXiv:2205.05638)."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from lowres_ft import libraries
from lowres_ft.errors import ModelError
from lowres_ft.methods.base import Method, Scale, matches, select

if TYPE_CHECKING:
    from peft import PeftConfig

_Names = tuple[Annotated[str, Field(min_length=1)], ...]

# What transformers' models call these layers, after PEFT's tables; of a fused projection the queries are scaled too.
_KEYS_AND_VALUES = re.compile(
    r"(^|\.)(key|value|[kv]|[kv]_proj|[kv]_lin|(key|value)_proj|c_attn|query_key_value|Wqkv|qkv_proj|self\.in_proj)$"
)
_SECOND_FEEDFORWARD = re.compile(
    r"(^|\.)((?<!attention\.)output\.dense|down_proj|mlp\.(c_proj|Wo|fc_out)|fc2|w2|lin2|ffn_output|dense_4h_to_h|wo)$"
)


class Ia3(Method):
    """y = l * (W x + b) for targets, y = W (l * x) + b for feed-forward layers; l is learned and begins with 1."""

    kind: Literal["ia3"] = "ia3"
    targets: Literal["auto"] | _Names = "auto"
    """Layers whose outputs are scaled: `auto` for key and value projections, or a list of names."""
    feedforward: Literal["auto"] | _Names = "auto"
    """Layers whose inputs are scaled: `auto` for the second one of each feed-forward block, or a list of names."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.targets and not self.feedforward:
            raise ValueError("targets and feedforward are both empty, so nothing would be trained")
        return self

    def choose(self, layers: Sequence[str]) -> tuple[str, ...]:
        outputs = _chosen(self.targets, layers, _KEYS_AND_VALUES, "method.targets")
        inputs = _chosen(self.feedforward, layers, _SECOND_FEEDFORWARD, "method.feedforward")
        if both := sorted(outputs & inputs):
            raise ModelError(
                f"method.targets and method.feedforward both name {both[0]}, and one factor scales either its outputs "
                "or its inputs",
                hint="Give both lists so that they do not overlap.",
            )
        return tuple(name for name in layers if name in outputs | inputs)

    def adapter(self, layer: str) -> Scale:
        return Scale("inputs" if self._scales_inputs(layer) else "outputs")

    def _scales_inputs(self, layer: str) -> bool:
        if self.feedforward == "auto":
            return bool(_SECOND_FEEDFORWARD.search(layer))
        return any(matches(layer, name) for name in self.feedforward)

    def peft_config(self, layers: Sequence[str], **border: Any) -> "PeftConfig":
        inputs = [layer for layer in layers if self._scales_inputs(layer)]
        names = border.pop("target_modules")
        short = {name for name in names if any(matches(layer, name) for layer in inputs)}
        if any(layer.endswith(tuple(short)) for layer in layers if layer not in inputs):
            # PEFT takes a layer for a feed-forward one where its name ends so, be it in the middle of a word.
            names, short = list(layers), set(inputs)
        config: PeftConfig = libraries.peft().IA3Config(
            target_modules=names, feedforward_modules=sorted(short), inference_mode=True, **border
        )
        return config


def _chosen(wanted: str | Sequence[str], layers: Sequence[str], known: re.Pattern[str], key: str) -> set[str]:
    """Those of `layers` that a field names, or that go by a `known` name."""
    if wanted != "auto":
        return set(select(wanted, layers, key))
    if found := {layer for layer in layers if known.search(layer)}:
        return found
    ends = ", ".join(sorted({layer.rpartition(".")[2] for layer in layers}))
    what = "keys and values" if key == "method.targets" else "the feed-forward blocks' second layers"
    raise ModelError(f"{key}: it cannot be told which layers of this base are {what}", hint=f"Give some of {ends}.")
