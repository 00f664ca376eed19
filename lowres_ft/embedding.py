"""Frozen embeddings of words in int8, and output layers that share their codes."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowres_ft import quantize
from lowres_ft.errors import ModelError
from lowres_ft.linear import AdaptedLinear
from lowres_ft.storage import Int8


class Int8Embedding(nn.Module):
    """Stands in for an embedding: rows of codes are gathered, then scaled."""

    def __init__(self, storage: Int8, dtype: torch.dtype, factor: Tensor | float | None = None) -> None:
        """Give rows in `dtype`, times the factor that Gemma's have."""
        super().__init__()
        self.storage, self.dtype = storage, dtype
        self.factor = factor.to(dtype) if isinstance(factor, Tensor) else factor
        self.num_embeddings, self.embedding_dim = storage.outputs, storage.inputs

    @property
    def weight(self) -> Tensor:
        """The codes; models ask for their device."""
        return self.storage.weight

    def forward(self, index: Tensor) -> Tensor:
        """(...) -> (..., features)."""
        rows = self.storage.rows(index, self.dtype)
        return rows if self.factor is None else rows * self.factor


def layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The embedding of words and, where the model writes, its output layer, by their names.

    Raises:
        ModelError: They are of a kind that cannot be held in int8.
    """
    wanted = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    found = {name: module for name, module in model.named_modules() if id(module) in wanted}
    for module in found.values():
        plain = type(module) in (nn.Embedding, nn.Linear)
        if not plain and not (type(module).__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale")):
            told = f"model.quantize_embeddings: this base has a {type(module).__name__}, which int8 cannot stand in for"
            raise ModelError(told, hint="Use model.quantize_embeddings=false.")
    return found


def hold(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace embedding and output layer by ones in int8; where they were tied, they share their codes."""
    held: dict[int, Int8] = {}
    for name, module in layers(model).items():
        weight = module.weight
        assert isinstance(weight, Tensor)
        storage = held.get(id(weight)) or quantize.storage(module) or quantize.quantized(weight, "int8")
        assert isinstance(storage, Int8)
        held[id(weight)] = storage
        if isinstance(module, nn.Linear):
            model.set_submodule(name, AdaptedLinear(storage, module.bias))
        else:
            model.set_submodule(name, Int8Embedding(storage, dtype, getattr(module, "embed_scale", None)))
