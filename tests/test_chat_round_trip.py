"""Chat bundles: trained, saved, opened in a fresh process with our code and with PEFT's, merged, verified."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowres_ft import bases, device, evaluate, merging, profiles
from lowres_ft import plan as plans
from lowres_ft.bundle import Bundle, open_bundle
from lowres_ft.linear import AdaptedLinear
from lowres_ft.merging import merge
from lowres_ft.pipeline import run
from lowres_ft.prediction import evaluate_bundle
from lowres_ft.tasks import _templates
from lowres_ft.tasks.chat import Chat
from lowres_ft.tasks.classification import Classification
from tests import tiny_chat
from tests.conftest import prepare
from tests.test_round_trip import TEXTS, in_fresh_process

Bases = Callable[..., Path]
CPU = device.find("cpu")


def trained(base: Path, chats: Path, out: Path, *overrides: str) -> Bundle:
    plain = ["task.template=plain"] if not (base / "chat_template.jinja").exists() else []
    return run(tiny_chat.recipe(base, chats, *plain, *overrides), out, device_name="cpu")


@pytest.mark.parametrize(("quantize", "tolerance"), [("none", 1e-5), ("int8", 0.2)])
def test_each_architecture_round_trips(quantize: str, tolerance: float, chat_bases: Bases, chats: Path, tmp_path: Path):
    folders = {}
    for architecture in tiny_chat.BASES:
        for tied in (True, False):
            name = f"{architecture} {tied}"
            base = chat_bases(architecture, tied=tied)
            folders[name] = trained(base, chats, tmp_path / name, f"model.quantize={quantize}").folder
            config = json.loads((folders[name] / "adapter_config.json").read_text())
            assert not config["modules_to_save"]
            assert config["task_type"] == "CAUSAL_LM"
            assert not any(target in ("lm_head", "embed_tokens") for target in config["target_modules"])
            tensors = load_file(folders[name] / "adapter_model.safetensors")
            assert all(".lora_A." in tensor or ".lora_B." in tensor for tensor in tensors)
            assert not any("lm_head" in tensor for tensor in tensors)
    found = in_fresh_process(list(folders.values()), TEXTS)
    for name, folder in folders.items():
        seen = found[str(folder)]
        np.testing.assert_allclose(seen["theirs"], seen["ours"], atol=tolerance, rtol=0, err_msg=name)
        assert seen["same_prompts"], name
        if quantize == "none":
            assert seen["printed"].strip() == seen["ours_printed"], name


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_output_layer_is_neither_adapted_nor_quantized(
    architecture: str, chat_bases: Bases, chats: Path, tmp_path: Path
):
    plain = ["task.template=plain"] if architecture == "gpt2" else []
    for tied in (True, False):
        base = chat_bases(architecture, tied=tied)
        ready = prepare(tiny_chat.recipe(base, chats, "model.quantize=int8", *plain), tmp_path / str(tied))
        layer = ready.adapted.model.get_output_embeddings()
        assert not isinstance(layer, AdaptedLinear)
        assert layer.weight.dtype.is_floating_point
        assert (layer.weight is ready.adapted.model.get_input_embeddings().weight) == tied
        assert not any("lm_head" in name for name in ready.adapted.trained())


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma", "gpt2"])
def test_a_bundle_verifies_evaluates_and_merges(architecture: str, chat_bases: Bases, chats: Path, tmp_path: Path):
    bundle = trained(chat_bases(architecture), chats, tmp_path / "bundle")
    verified = bundle.verify(CPU)
    assert (verified.probe_rows, verified.exact) == (2, True)
    (tmp_path / "work").mkdir()
    scores = evaluate_bundle(bundle, *bundle.load(CPU), tmp_path / "work")
    assert scores.to_json() == json.loads((bundle.folder / "report.json").read_text())["scores"]["test"]
    merged = merge(bundle, tmp_path / "merged", CPU)
    assert merged.flipped == 0
    assert merged.metric == pytest.approx(scores.metrics["loss"].value, abs=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.config.model_type == architecture
    ends = np.atleast_1d(plain.generation_config.eos_token_id).tolist()
    # Other programs stop there too.
    assert set(_templates.turn_ends(AutoTokenizer.from_pretrained(tmp_path / "merged"))) <= set(ends)
    card = (bundle.folder / "README.md").read_text()
    assert (f"eos_token_id={ends}" in card) == (architecture == "gemma")  # whose base stops at <eos> alone


def test_a_merge_keeps_few_logits_of_a_large_vocabulary(
    chat_bases: Bases, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bundle = trained(chat_bases(), chats, tmp_path / "bundle")
    prepared = prepare(bundle.recipe, tmp_path / "work", evaluation_tokens=1)
    tokens, vocabulary = prepared.tokens["train"], 333
    everything = evaluate.logits(prepared.adapted, tokens, prepared.plan, most=2**30)
    assert everything.shape == (len(tokens), vocabulary)
    some = evaluate.logits(prepared.adapted, tokens, prepared.plan, most=5 * vocabulary)
    longest = np.sort(np.argsort(-tokens.lengths, kind="stable")[:5])
    np.testing.assert_array_equal(some, everything[longest])
    assert len(evaluate.logits(prepared.adapted, tokens, prepared.plan, most=1)) == 1
    monkeypatch.setattr(merging, "_MOST_LOGITS", 1)
    merged = merge(bundle, tmp_path / "merged", CPU, rows=str(chats))
    assert merged.rows == 1


def test_a_large_vocabulary_makes_smaller_micro_batches_only_where_logits_stand_in_memory_whole(
    chat_bases: Bases, chats: Path
):
    recipe = tiny_chat.recipe(chat_bases(), chats)
    profile = profiles.profile(bases.resolve(recipe.model), recipe.task)
    for kind, vocabulary, expected in (
        ("cpu", 333, (1024, 2048)),
        ("cpu", 100_000, (1024, 1342)),
        ("cpu", 151_936, (883, 883)),
        ("cuda:1", 151_936, (3533, 3533)),
    ):
        plan = plans.make(recipe, replace(profile, vocabulary=vocabulary), replace(CPU, device=kind))
        assert plan.evaluation_tokens == 2 * plan.micro_batch_tokens == {"cpu": 2048, "cuda:1": 8192}[kind]
        plan = plans.for_whole_logits(plan, vocabulary)
        assert (plan.micro_batch_tokens, plan.evaluation_tokens) == expected


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_full_fine_tuning_writes_a_whole_model(
    architecture: str, tied: bool, chat_bases: Bases, chats: Path, tmp_path: Path
):
    base = chat_bases(architecture, tied=tied)
    bundle = trained(base, chats, tmp_path / "bundle", "method.kind=full", "train.learning_rate=0.001")
    assert open_bundle(bundle.folder).verify(CPU).exact
    seen = in_fresh_process([bundle.folder], TEXTS)[str(bundle.folder)]
    np.testing.assert_allclose(seen["theirs"], seen["ours"], atol=1e-5, rtol=0)
    assert seen["printed"].strip() == seen["ours_printed"]


@pytest.mark.parametrize(("dtype", "methods"), [("bfloat16", ("lora", "full")), ("float16", ("full", "lora"))])
def test_every_architecture_trains_in_16_bits(
    dtype: str, methods: tuple[str, ...], chat_bases: Bases, chats: Path, tmp_path: Path
):
    for architecture, method in zip(tiny_chat.BASES, cycle(methods), strict=False):  # in turn
        overrides = (f"model.dtype={dtype}", f"method.kind={method}", "train.learning_rate=0.001")
        trained(chat_bases(architecture), chats, tmp_path / architecture, *overrides)


def test_training_lowers_the_loss(chat_bases: Bases, chats: Path, tmp_path: Path):
    bundle = trained(chat_bases(), chats, tmp_path / "bundle", "train.steps=40")
    report = json.loads((bundle.folder / "report.json").read_text())
    gain = report["baselines"]["base"]["gain"]
    assert gain["low"] > 0
    assert report["scores"]["test"]["loss"]["value"] < report["baselines"]["base"]["loss"]["value"]


def test_a_merge_counts_the_flip_of_a_token_only_where_it_was_no_tie():
    tie, clear = np.array([[1.0, 1.0001, 0.0]]), np.array([[1.0, 1.5, 0.0]])
    turned = np.array([[1.0001, 1.0, 0.0]])
    assert merging._flipped(Chat(), tie, turned, gap=1e-4) == 0
    assert merging._flipped(Chat(), clear, turned, gap=1e-4) == 1
    assert merging._flipped(Classification(labels=("a", "b", "c")), tie, turned, gap=1e-4) == 1
