"""Merged models in bitsandbytes' formats, and adapters on bitsandbytes' own layers."""

import json
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from lowres_ft import bases as base_module
from lowres_ft import device
from lowres_ft.errors import ModelError
from lowres_ft.merging import merge
from lowres_ft.parts import ModelSpec
from lowres_ft.pipeline import run
from tests import tiny_chat
from tests.conftest import Command, recipe
from tests.test_methods import WIDE, logits, wide
from tests.test_reading import foreign, held, same

Bases = Callable[..., Path]
CPU = device.find("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_a_merged_model_is_written_in_a_format_that_others_load(
    form: str, dtype: str, bases: Bases, reviews: Path, tmp_path: Path
):
    for name in WIDE:
        wanted = wide(bases, reviews, name, f"model.dtype={dtype}", f"model.quantize={form}")
        bundle = run(wanted, tmp_path / name, device_name="cpu")
        plain = merge(bundle, tmp_path / f"{name}.plain", CPU)
        merged = merge(bundle, tmp_path / f"{name}.small", CPU, quantize=form)
        lost = merged.quantized
        assert lost is not None
        assert lost.form == form
        assert 1e-4 < lost.largest_difference < (0.2 if form == "int8" else 0.6)
        assert (merged.largest_difference, merged.metric) == (plain.largest_difference, plain.metric)
        loaded, again = (foreign(tmp_path / f"{name}.{which}", form) for which in ("small", "plain"))
        codes = held(loaded)
        assert len(codes) >= 8
        assert all(parameter.dtype != torch.float32 or dtype == "float32" for parameter in loaded.parameters())
        if dtype == "float32":  # else they are quantized from 16 bits
            assert all(same(storage, held(again)[layer]) for layer, storage in codes.items())
        head = loaded.classifier if name == "bert" else loaded.score
        assert head.weight.dtype == getattr(torch, dtype)
        files = {path.name for path in (tmp_path / f"{name}.small").iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
        assert not any(path.is_dir() for path in (tmp_path / f"{name}.small").iterdir())


def test_a_merged_model_in_a_format_is_a_base_again(bases: Bases, reviews: Path, tmp_path: Path):
    bundle = run(wide(bases, reviews, "llama"), tmp_path / "bundle", device_name="cpu")
    merge(bundle, tmp_path / "small", CPU, quantize="nf4")
    next_one = run(recipe(tmp_path / "small", reviews, "model.quantize=nf4"), tmp_path / "next", device_name="cpu")
    assert next_one.verify(CPU).exact
    with pytest.raises(ModelError, match=r"holds its weights in nf4 already, so model.quantize=none cannot be"):
        merge(next_one, tmp_path / "merged", CPU)


def test_a_chat_model_is_merged_into_a_format(chat_bases: Bases, chats: Path, tmp_path: Path):
    for tied in (True, False):
        wanted = tiny_chat.recipe(chat_bases("llama", tied=tied), chats)
        bundle = run(wanted, tmp_path / f"{tied}", device_name="cpu")
        merged = merge(bundle, tmp_path / f"{tied}.small", CPU, quantize="int8")
        assert merged.quantized is not None
        assert merged.quantized.metric == pytest.approx(merged.metric, abs=0.1)
        found = base_module.resolve(ModelSpec(base=str(tmp_path / f"{tied}.small"))).config()
        assert found["quantization_config"]["load_in_8bit"]
        assert found["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]


def test_widths_that_a_format_cannot_hold_are_refused(bases: Bases, reviews: Path, tmp_path: Path):
    bundle = run(recipe(bases("bert"), reviews), tmp_path / "bundle", device_name="cpu")
    with pytest.raises(ModelError, match="blocks of 64, which do not divide the 32 inputs"):
        merge(bundle, tmp_path / "merged", CPU, quantize="nf4")
    assert not (tmp_path / "merged").exists()


def test_the_command_tells_what_a_format_lost(bases: Bases, reviews: Path, tmp_path: Path, lowres: Command):
    bundle = run(wide(bases, reviews, "bert"), tmp_path / "bundle", device_name="cpu")
    code, out, err = lowres("merge", bundle.folder, tmp_path / "merged", "--quantize", "int8", "--device", "cpu")
    assert (code, err) == (0, "")
    assert "in int8: largest difference of a logit" in out
    assert out.splitlines()[-1].endswith("merged, int8, for any program that reads transformers models of bitsandbytes")
    code, out, _ = lowres("merge", bundle.folder, tmp_path / "m", "--quantize", "nf4", "--json", "--device", "cpu")
    assert (code, json.loads(out)["quantized"]["form"]) == (0, "nf4")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's, of a name in transformers
@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_an_adapter_works_on_bitsandbytes_own_layers(form: str, bases: Bases, reviews: Path, tmp_path: Path):
    """Not repacked, its nf4 layers compute with the very weights in fp32; its int8 layers round the inputs too."""
    for name in WIDE:
        wanted = wide(bases, reviews, name, f"model.quantize={form}", "train.steps=8")
        bundle = run(wanted, tmp_path / name, device_name="cpu")
        ours, _ = bundle.load(CPU)
        base = foreign(bases(name, **WIDE[name]), form)
        base.config.pad_token_id = ours.model.config.pad_token_id
        theirs = PeftModel.from_pretrained(base, str(bundle.folder)).eval()
        kind = bitsandbytes.nn.Linear8bitLt if form == "int8" else bitsandbytes.nn.Linear4bit
        layers = [module for module in theirs.modules() if isinstance(module, kind)]
        assert len(layers) >= 8
        for layer in layers:
            layer.support_avx512bf16_for_cpu = False
        with torch.no_grad():
            found = theirs(input_ids=torch.tensor([[5, 6, 7], [9, 8, 7]])).logits
        np.testing.assert_allclose(found, logits(ours), atol=0.05 if form == "int8" else 1e-4, rtol=0, err_msg=name)


def test_the_merged_model_is_written_in_fp32_unless_asked(bases: Bases, reviews: Path, tmp_path: Path):
    bundle = run(wide(bases, reviews, "bert"), tmp_path / "bundle", device_name="cpu")
    assert merge(bundle, tmp_path / "merged", CPU).quantized is None
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
