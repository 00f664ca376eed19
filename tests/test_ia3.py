"""Which layers IA3 scales: by itself in each architecture, by name, or not at all."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lowres_ft import profiles
from lowres_ft.bases import Base
from lowres_ft.errors import ModelError, RecipeError
from lowres_ft.methods.ia3 import Ia3
from lowres_ft.tasks.classification import Classification
from tests import tiny
from tests.conftest import recipe
from tests.test_round_trip import compare

Bases = Callable[..., Path]
IA3 = {
    "albert": ["attention.key", "attention.value", "ffn_output"],
    "deberta-v2": ["attention.self.key_proj", "attention.self.value_proj", "0.output.dense"],
    "distilbert": ["k_lin", "v_lin", "ffn.lin2"],
    "gpt2": ["attn.c_attn", "mlp.c_proj"],
    "llama": ["self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"],
    "modernbert": ["attn.Wqkv", "mlp.Wo"],
    "opt": ["k_proj", "v_proj", "fc2"],
    "falcon": ["query_key_value", "dense_4h_to_h"],
} | {key: ["self.key", "self.value", "0.output.dense"] for key in ["bert", "roberta", "xlm-roberta", "electra"]}


@pytest.mark.parametrize("architecture", [*tiny.ARCHITECTURES, "deberta", "falcon", "opt"])
def test_ia3_finds_keys_values_and_second_feedforward_layers(bases: Bases, reviews: Path, architecture: str):
    task = Classification(labels=("bad", "good"))
    profile = profiles.profile(Base("", bases(architecture), ""), task)
    method = Ia3()
    chosen = profiles.targets(method, profile.linears)
    first = [name for name in chosen if ".1." not in name]
    expected = IA3.get(architecture, IA3["llama"])
    if architecture == "deberta":
        expected = ["self.in_proj", "0.output.dense"]
    assert len(first) == len(expected)
    for name, end in zip(first, expected, strict=True):
        assert name.endswith(end)
        assert "attention.output" not in name
    scaled = {name: method.adapter(name).of for name in first}
    assert list(scaled.values()) == ["outputs"] * (len(first) - 1) + ["inputs"]


def test_ia3_takes_names_and_says_what_it_cannot_tell(bases: Bases, reviews: Path, tmp_path: Path):
    wanted = {
        "names": ["method.targets=[query, output.dense]", "method.feedforward=[layer.0.intermediate.dense]"],
        "none": ["method.targets=[attention.output.dense, pooler.dense]", "method.feedforward=[]"],
        "inputs": ["method.targets=[]", "method.feedforward=[query]"],
    }
    recipes = {name: recipe(bases(), reviews, "method.kind=ia3", *changes) for name, changes in wanted.items()}
    compare(recipes, tmp_path)
    for layers, told in (
        (["a.wq", "a.down_proj"], "method.targets: it cannot be told which layers of this base are keys and values"),
        (["a.k_proj", "a.up"], "method.feedforward: it cannot be told which layers of this base are the feed-forward"),
    ):
        with pytest.raises(ModelError, match=told) as caught:
            Ia3().choose(layers)
        assert caught.value.hint == f"Give some of {', '.join(sorted(name[2:] for name in layers))}."
    with pytest.raises(ModelError, match=r"both name a.down_proj"):
        Ia3(targets=("down_proj",)).choose(["a.k_proj", "a.down_proj"])
    with pytest.raises(RecipeError, match="both empty"):
        recipe(bases(), reviews, "method.kind=ia3", "method.targets=[]", "method.feedforward=[]")
