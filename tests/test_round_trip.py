"""Every architecture: train two steps, save, load in a fresh process with our code and with PEFT's, compare."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

from lowres_ft import profiles
from lowres_ft.bases import Base
from lowres_ft.batches import in_memory
from lowres_ft.errors import ModelError
from lowres_ft.evaluate import outputs
from lowres_ft.methods.lora import Lora
from lowres_ft.pipeline import run
from lowres_ft.profiles import Linear
from lowres_ft.recipe import Recipe
from lowres_ft.tasks.base import Example
from lowres_ft.tasks.classification import Classification
from lowres_ft.train import train
from tests import tiny
from tests.conftest import prepare, recipe

Bases = Callable[..., Path]
TEXTS = ["the film was good", "dull and long but not bad", "a great plot", "awful"]
HEADS = {
    "distilbert": ["classifier", "pre_classifier"],
    "deberta-v2": ["classifier", "pooler"],
    "modernbert": ["classifier", "head"],
}


def expected_heads(architecture: str) -> list[str]:
    return HEADS.get(architecture, ["score"] if architecture in tiny.DECODERS else ["classifier"])


def in_fresh_process(folders: list[Path]) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.fresh", json.dumps([str(f) for f in folders]), json.dumps(TEXTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def trained_logits(wanted: Recipe, work: Path) -> np.ndarray:
    """Logits of the model as it stands after training, before anything is written."""
    prepared = prepare(wanted, work)
    for _ in train(prepared.start(), prepared.tokens["train"], prepared.plan, prepared.machine):
        pass
    adapted = prepared.adapted
    encoded = adapted.task.encode(adapted.tokenizer, [Example("", text) for text in TEXTS])
    return outputs(adapted, in_memory(encoded), prepared.plan)


def compare(wanted: dict[str, Recipe], folder: Path, tolerance: float = 1e-5) -> dict[str, Path]:
    """Run recipes, and compare the trained models with what a fresh process loads."""
    bundles = {name: run(found, folder / name, device_name="cpu").folder for name, found in wanted.items()}
    seen = in_fresh_process(list(bundles.values()))
    for name, place in bundles.items():
        logits = trained_logits(wanted[name], folder / f"{name}.work")
        np.testing.assert_array_equal(np.float32(seen[str(place)]["ours"]), logits, err_msg=name)
        np.testing.assert_allclose(seen[str(place)]["theirs"], logits, atol=tolerance, rtol=0, err_msg=name)
        assert seen[str(place)]["labels"] == {"0": "bad", "1": "good"}
    return bundles


def test_each_architecture_round_trips_through_a_fresh_process_and_through_peft(
    bases: Bases, reviews: Path, tmp_path: Path
):
    wanted = {name: recipe(bases(name), reviews, "method.dropout=0.1") for name in tiny.ARCHITECTURES}
    assert len(wanted) == 13
    bundles = compare(wanted, tmp_path)
    for architecture, folder in bundles.items():
        config = json.loads((folder / "adapter_config.json").read_text())
        assert sorted(config["modules_to_save"]) == expected_heads(architecture)
        assert config["fan_in_fan_out"] == (architecture == "gpt2")


def test_each_method_round_trips(bases: Bases, reviews: Path, tmp_path: Path):
    wanted = {
        f"{method} {name}": recipe(bases(name), reviews, f"method.kind={method}", "train.learning_rate=0.001")
        for method in ("head", "full")
        for name in ("bert", "deberta-v2", "gpt2")
    }
    compare(wanted, tmp_path)


def test_targets_and_rslora_round_trip(bases: Bases, reviews: Path, tmp_path: Path):
    wanted = {
        "attention": recipe(bases("roberta"), reviews, "method.targets=attention", "method.rslora=true"),
        "names": recipe(bases("qwen3"), reviews, "method.targets=[q_proj, v_proj]", "method.alpha=5"),
        "one": recipe(bases("bert"), reviews, "method.targets=[layer.1.output.dense]"),
    }
    compare(wanted, tmp_path)


def test_int8_round_trips_and_is_near_the_unquantized_base(bases: Bases, reviews: Path, tmp_path: Path):
    """PEFT's client has the unquantized base, so its logits are near, not equal."""
    names = ("bert", "distilbert", "gpt2", "qwen3")
    wanted = {name: recipe(bases(name), reviews, "model.quantize=int8") for name in names}
    bundles = compare(wanted, tmp_path, tolerance=0.2)
    for name, folder in bundles.items():
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["fan_in_fan_out"] == (name == "gpt2")


def test_a_pooler_that_the_files_lack_is_trained_and_saved(bases: Bases, reviews: Path, tmp_path: Path):
    folder = bases("bert", seed=3)
    masked = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(folder))
    masked.save_pretrained(tmp_path / "masked")
    tiny.tokenizer().save_pretrained(tmp_path / "masked")
    for quantize in ("none", "int8"):
        wanted = recipe(tmp_path / "masked", reviews, f"model.quantize={quantize}")
        bundles = compare({quantize: wanted}, tmp_path, tolerance=1e-5 if quantize == "none" else 0.2)
        config = json.loads((bundles[quantize] / "adapter_config.json").read_text())
        assert sorted(config["modules_to_save"]) == ["bert.pooler", "classifier"]


def test_a_head_for_other_labels_is_made_anew(bases: Bases, reviews: Path, tmp_path: Path):
    config = AutoConfig.from_pretrained(bases("bert"), num_labels=3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "three")
    tiny.tokenizer().save_pretrained(tmp_path / "three")
    bundle = run(recipe(tmp_path / "three", reviews), tmp_path / "bundle", device_name="cpu")
    assert bundle.passport.labels == ("bad", "good")


def test_weights_of_another_model_are_refused(bases: Bases, reviews: Path, tmp_path: Path):
    folder = tiny.base(tmp_path / "base", "bert", num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ModelError, match=r"lack bert.encoder.layer.1.*not this model's"):
        run(recipe(folder, reviews), tmp_path / "bundle", device_name="cpu")
    assert not (tmp_path / "bundle").exists()


def test_long_texts_use_fused_attention_where_the_base_has_it(bases: Bases, reviews: Path, tmp_path: Path):
    for architecture, expected in (("bert", "sdpa"), ("deberta-v2", "eager")):
        prepared = prepare(recipe(bases(architecture), reviews, "task.max_length=200"), tmp_path / architecture)
        assert prepared.plan.attention == expected


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", ["a.attn.q", "a.attn.out", "a.mlp.up"]),
        ("attention", ["a.attn.q", "a.attn.out"]),
        (("q", "up"), ["a.attn.q", "a.mlp.up"]),
        (("mlp.up",), ["a.mlp.up"]),
    ],
)
def test_targets(targets: Any, expected: list[str]):
    linears = tuple(Linear(name, 4, 4) for name in ("a.attn.q", "a.attn.out", "a.mlp.up"))
    assert list(profiles.targets(Lora(targets=targets), linears)) == expected


def test_an_unknown_target_is_refused_with_the_nearest_name():
    linears = (Linear("layer.query", 4, 4), Linear("layer.value", 4, 4))
    with pytest.raises(ModelError, match=r"no linear layer is called 'qeury' \(did you mean 'query'\?\)") as caught:
        profiles.targets(Lora(targets=("value", "qeury")), linears)
    assert caught.value.hint == "This base has query, value."


def test_a_profile_counts_what_training_trains(bases: Bases, reviews: Path, tmp_path: Path):
    for architecture in ("bert", "gpt2", "albert", "qwen3"):
        for method in ("lora", "head", "full"):
            wanted = recipe(bases(architecture), reviews, f"method.kind={method}")
            prepared = prepare(wanted, tmp_path / f"{architecture}{method}")
            base = Base(str(bases(architecture)), bases(architecture), "")
            profile = profiles.profile(base, Classification(labels=("bad", "good")))
            trained = sum(p.numel() for p in prepared.adapted.trained().values())
            assert profiles.trainable(wanted.method, profile) == trained
