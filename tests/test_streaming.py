"""Layers that pass through room for two of them: the same bits, and never more than two resident."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowres_ft import evaluate
from lowres_ft.train import train
from tests import tiny
from tests.conftest import Prepared, prepare, recipe
from tests.test_recompute import METHODS
from tests.test_train import randomize

Bases = Callable[..., Path]
STREAMED = {name: changes for name, changes in METHODS.items() if name != "full"}
DEPTHS = {"distilbert": "n_layers", "gpt2": "n_layer"}
PASSES = "budget.offload=layers"


def deep(bases: Bases, architecture: str, **changes: object) -> Path:
    """A base of five layers."""
    return bases(architecture, **{DEPTHS.get(architecture, "num_hidden_layers"): 5}, **changes)


def results(prepared: Prepared) -> tuple[list[float], dict[str, Tensor], list[object]]:
    """Losses of all steps, evaluations between them, and what was learned."""
    randomize(prepared)
    losses, scores = [], []
    for step in train(prepared.start(), prepared.tokens["train"], prepared.plan, prepared.machine):
        losses.append((step.loss, step.gradient_norm))
        outputs = evaluate.outputs(prepared.adapted, prepared.tokens["validation"], prepared.plan)
        scores.append(outputs.values.tolist())
    return losses, {name: tensor.clone() for name, tensor in prepared.adapted.tensors().items()}, scores


def same(resident: Prepared, streamed: Prepared) -> None:
    """Both learn the same to the bit, one of them with two layers at a time."""
    assert resident.adapted.stream is None
    plain, passed = results(resident), results(streamed)
    assert plain[0] == passed[0]
    assert plain[2] == passed[2]
    assert plain[1].keys() == passed[1].keys()
    assert all(torch.equal(tensor, passed[1][name]) for name, tensor in plain[1].items())
    stream = streamed.adapted.stream
    assert stream is not None
    assert stream.most == 2
    assert stream.entered > 0


@pytest.mark.parametrize("architecture", sorted(set(tiny.ARCHITECTURES) - {"albert"}))
def test_each_architecture_learns_the_same(architecture: str, bases: Bases, reviews: Path, tmp_path: Path):
    made = deep(bases, architecture)
    resident, streamed = (
        prepare(recipe(made, reviews, *METHODS["lora"], f"budget.offload={how}"), tmp_path / how)
        for how in ("none", "layers")
    )
    same(resident, streamed)
