"""How many of a step's multiplications are useful.

Useful FLOPs are two for each multiplication and addition of the products that training cannot do without: the forward
products of all linear layers and adapters and of attention; of the backward pass the gradients of their inputs, where
something below them is trained, and of the adapters' weights. Padding, recomputation, conversions and all that is no
product count for nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowres_ft import bases, profiles
from lowres_ft.profiles import Profile
from lowres_ft.recipe import Recipe


@dataclass(frozen=True)
class Layer:
    """A linear layer of the base as a step sees it."""

    inputs: int
    outputs: int
    rank: int
    """Of its adapter; 0 where it has none."""
    every_token: bool
    """False where one row a sequence passes, as in a pooler."""
    above_trained: bool
    """Whether the gradient of its input is needed: something below it is trained."""


@dataclass(frozen=True)
class Cost:
    """Useful FLOPs of a model with a LoRA adapter."""

    layers: tuple[Layer, ...]
    attention_layers: int
    attention_width: int
    """Heads times the width of a head."""
    causal: bool
    head: int
    """Multiplications of the output layer or head for one item."""
    head_trained: bool

    def forward(self, tokens: int, items: int) -> float:
        """Of a sequence of `tokens`, `items` of which (or the whole of which) are supervised."""
        products = 0
        for layer in self.layers:
            rows = tokens if layer.every_token else 1
            products += rows * (layer.inputs * layer.outputs + layer.rank * (layer.inputs + layer.outputs))
        return 2.0 * (products + self._attention(tokens) + items * self.head)

    def backward(self, tokens: int, items: int) -> float:
        """Of the same sequence, the gradients that training needs."""
        products = 0
        for layer in self.layers:
            rows = tokens if layer.every_token else 1
            through = layer.inputs * (layer.outputs + layer.rank) if layer.above_trained else 0
            products += rows * (through + layer.outputs * layer.rank)  # dx = dy W + dh A, dh = dy B
            products += rows * layer.rank * (layer.inputs + layer.outputs)  # dA, dB
        return 2.0 * (products + 2 * self._attention(tokens) + items * self.head * (2 if self.head_trained else 1))

    def _attention(self, tokens: int) -> int:
        """Multiplications of scores and of their mixture; a causal model looks back only."""
        pairs = tokens * (tokens + 1) // 2 if self.causal else tokens * tokens
        return 2 * self.attention_layers * self.attention_width * pairs


def cost(recipe: Recipe) -> Cost:
    """Look at the model of a recipe whose labels are known, without reading a weight."""
    base = bases.resolve(recipe.model)
    profile = profiles.profile(base, recipe.task)
    config = profiles.config(base, recipe.task)
    with torch.device("meta"), profiles.quiet():
        model = profiles.auto_class(recipe.task).from_config(config)
    generates = recipe.task.generates
    return Cost(
        layers=tuple(_layers(model, recipe, profile)),
        attention_layers=profile.layers,
        attention_width=profile.hidden,
        causal=generates,
        head=profile.hidden * profile.vocabulary if generates else profile.head_parameters,
        head_trained=not generates,
    )


def _layers(model: Any, recipe: Recipe, profile: Profile) -> list[Layer]:
    """Send a few tokens through a model without weights and watch its linear layers.

    Each adapted layer's output is marked as one that training changes, so that PyTorch tells which inputs need
    gradients.
    """
    chosen = set(profiles.targets(recipe.method, profile.linears))
    rank = getattr(recipe.method, "rank", 0)
    seen: dict[str, Layer] = {}
    length = 4

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            rows = inputs[0].numel() // inputs[0].shape[-1]
            own = rank if name in chosen else 0
            seen[name] = Layer(*profiles.widths(module), own, rows == length, inputs[0].requires_grad)
            return output + torch.zeros(1, device="meta", requires_grad=bool(own))

        return hook

    model.requires_grad_(False).eval()
    for name, module in profiles.linear_layers(model, profile.outside):
        module.register_forward_hook(watch(name))
    model(input_ids=torch.zeros(1, length, dtype=torch.long, device="meta"))
    return list(seen.values())
