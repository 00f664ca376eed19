"""Every architecture: train two steps, save, load in a fresh process with our code and with PEFT's, compare."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

from lowres_ft import profiles
from lowres_ft.bases import Base
from lowres_ft.batches import in_memory
from lowres_ft.errors import ModelError
from lowres_ft.evaluate import logits
from lowres_ft.methods.lora import Lora
from lowres_ft.pipeline import run
from lowres_ft.preparing import rehearse
from lowres_ft.profiles import Linear
from lowres_ft.recipe import Recipe
from lowres_ft.tasks.classification import Classification
from lowres_ft.train import train
from tests import tiny
from tests.conftest import prepare, recipe
from tests.fresh import examples

Bases = Callable[..., Path]
TEXTS = ["the film was good", "dull and long but not bad", "a great plot", "awful"]
HEADS = {
    "distilbert": ["classifier", "pre_classifier"],
    "deberta-v2": ["classifier", "pooler"],
    "modernbert": ["classifier", "head"],
}


def expected_heads(architecture: str) -> list[str]:
    return HEADS.get(architecture, ["score"] if architecture in tiny.DECODERS else ["classifier"])


def in_fresh_process(folders: list[Path], texts: list[Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.fresh", json.dumps([str(f) for f in folders]), json.dumps(texts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def trained_logits(wanted: Recipe, work: Path, texts: list[Any]) -> np.ndarray:
    """Logits of the model as it stands after training, before anything is written."""
    prepared = prepare(wanted, work)
    for _ in train(prepared.start(), prepared.tokens["train"], prepared.plan, prepared.machine):
        pass
    adapted = prepared.adapted
    encoded = adapted.task.encode(adapted.tokenizer, examples(adapted.task, texts))
    return logits(adapted, in_memory(encoded), prepared.plan)


def compare(
    wanted: dict[str, Recipe],
    folder: Path,
    tolerance: float = 1e-5,
    texts: list[Any] = TEXTS,
    labels: tuple[str, ...] = ("bad", "good"),
) -> dict[str, Path]:
    """Run recipes, and compare the trained models with what a fresh process loads."""
    bundles = {name: run(found, folder / name, device_name="cpu").folder for name, found in wanted.items()}
    seen = in_fresh_process(list(bundles.values()), texts)
    for name, place in bundles.items():
        logits = trained_logits(wanted[name], folder / f"{name}.work", texts)
        np.testing.assert_array_equal(np.float32(seen[str(place)]["ours"]), logits, err_msg=name)
        np.testing.assert_allclose(seen[str(place)]["theirs"], logits, atol=tolerance, rtol=0, err_msg=name)
        assert seen[str(place)]["labels"] == {str(index): label for index, label in enumerate(labels)}
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


def test_architectures_with_traits_of_their_own_round_trip(bases: Bases, reviews: Path, tmp_path: Path):
    names = ("deberta", "falcon", "opt")  # projections split in place, fused heads, texts flattened
    compare({name: recipe(bases(name), reviews, "method.dropout=0.1") for name in names}, tmp_path)


@pytest.mark.parametrize(
    ("quantize", "dtypes"),
    [("none", ["bfloat16"]), ("none", ["float16"]), ("int8", ["bfloat16", "float16"])],  # in turn
)
def test_every_architecture_trains_in_16_bits(
    bases: Bases, reviews: Path, tmp_path: Path, quantize: str, dtypes: list[str]
):
    for name, dtype in zip(tiny.ARCHITECTURES, cycle(dtypes), strict=False):
        wanted = recipe(bases(name), reviews, f"model.dtype={dtype}", f"model.quantize={quantize}", "data.test=null")
        run(wanted, tmp_path / name, device_name="cpu")


def test_a_base_that_answers_by_its_padding_is_refused(bases: Bases, reviews: Path, tmp_path: Path):
    with pytest.raises(ModelError, match=r"'xlnet'.*answers differently when a text is padded"):
        run(recipe(bases("xlnet"), reviews), tmp_path / "bundle", device_name="cpu")


def test_the_models_padding_is_the_tokenizers(bases: Bases, reviews: Path, tmp_path: Path):
    """Older Llama checkpoints name a padding id that their tokenizer does not use."""
    folder = tiny.base(tmp_path / "base", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 0}))
    compare({"llama": recipe(folder, reviews)}, tmp_path)


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("llama", {"vocab_size": 40}, "hold another shape of model.embed_tokens.weight"),
        ("gpt2", {"n_positions": 32}, "hold another shape of transformer.wpe.weight"),
        ("bert", {"type_vocab_size": 3}, "hold another shape of bert.embeddings.token_type_embeddings.weight"),
    ],
)
def test_an_edited_config_is_refused(
    reviews: Path, tmp_path: Path, architecture: str, change: dict[str, int], message: str
):
    folder = tiny.base(tmp_path / "base", architecture)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    for method in ("lora", "head", "full"):
        with pytest.raises(ModelError, match=message):
            run(recipe(folder, reviews, f"method.kind={method}"), tmp_path / "bundle", device_name="cpu")


@pytest.mark.parametrize("method", ["lora", "head", "full"])
def test_the_config_of_one_model_over_the_weights_of_another_is_refused(
    bases: Bases, reviews: Path, tmp_path: Path, method: str
):
    folder = tiny.base(tmp_path / "base", "bert")
    shutil.copy(bases("llama") / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(ModelError, match="the weights lack bert"):
        run(recipe(folder, reviews, f"method.kind={method}"), tmp_path / "bundle", device_name="cpu")


def test_truncated_weights_are_told(reviews: Path, tmp_path: Path):
    folder = tiny.base(tmp_path / "base")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        run(recipe(folder, reviews), tmp_path / "bundle", device_name="cpu")


@pytest.mark.parametrize(
    ("architecture", "positions"), [("bert", 64), ("roberta", 63), ("gpt2", 64), ("opt", 64), ("llama", None)]
)
def test_texts_longer_than_the_positions_are_refused_before_weights_are_read(
    bases: Bases, reviews: Path, tmp_path: Path, architecture: str, positions: int | None
):
    wanted = recipe(bases(architecture), reviews, "task.max_length=100", "train.steps=1")
    if positions is None:
        assert rehearse(wanted, device_name="cpu").profile.positions is None
        return
    with pytest.raises(ModelError, match=f"max_length is 100, but this base has positions for {positions} tokens"):
        rehearse(wanted, device_name="cpu")
    long = tmp_path / "long.csv"
    text = " ".join(tiny.WORDS * 5)
    long.write_text("text,label\n" + "".join(f"{text} {n},{('good', 'bad')[n % 2]}\n" for n in range(20)))
    fits = recipe(bases(architecture), long, f"task.max_length={positions}", "train.steps=1")
    run(fits, tmp_path / "bundle", device_name="cpu")


def test_code_that_comes_with_a_base_is_never_run(bases: Bases, reviews: Path, tmp_path: Path):
    folder = tiny.base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    maps = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": maps}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(ModelError):
        run(recipe(folder, reviews), tmp_path / "bundle", device_name="cpu")
    assert not (tmp_path / "ran").exists()


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
