"""Weights as they are read: the codes of bitsandbytes' own layers, for less memory; bases that hold codes already."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, modeling_utils

from lowres_ft import quantize
from lowres_ft.errors import ModelError
from lowres_ft.linear import AdaptedLinear
from lowres_ft.pipeline import run
from lowres_ft.storage import Int8, Nf4, Storage
from tests import tiny, tiny_chat
from tests.conftest import prepare, recipe
from tests.test_methods import WIDE, wide

Bases = Callable[..., Path]
FORMS: dict[str, dict[str, Any]] = {
    "int8": quantize.config_fields("int8"),
    "nf4": quantize.config_fields("nf4"),
    "nf4 with plain maxima": quantize.config_fields("nf4") | {"bnb_4bit_use_double_quant": False},
}


def foreign(folder: Path, form: str) -> nn.Module:
    """A base as transformers and bitsandbytes load it, quantized by them or before."""
    config = {"quantization_config": BitsAndBytesConfig(**FORMS[form], llm_int8_skip_modules=["classifier", "score"])}
    options = config if "quantization_config" not in json.loads((folder / "config.json").read_text()) else {}
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, **options)


def held(model: nn.Module) -> dict[str, Storage]:
    """The quantized weights of a model by the names of their layers, ours or bitsandbytes'."""
    found = {}
    for name, module in model.named_modules():
        storage = module.storage if isinstance(module, AdaptedLinear) else quantize.storage(module)
        if isinstance(storage, Int8 | Nf4) and name:
            found[name] = storage
    return {name: s for name, s in found.items() if not name.endswith("storage")}


def same(ours: Storage, theirs: Storage) -> bool:
    own, other = ours.state_dict(), theirs.state_dict()
    return own.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in own.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_what_is_read_is_what_bitsandbytes_would_hold(
    form: str, dtype: str, bases: Bases, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(quantize, "_AT_ONCE", 640)  # in many slices, the last of them shorter
    for name, fields in WIDE.items():
        folder = tmp_path / f"{name}.{dtype}"
        model = AutoModelForSequenceClassification.from_pretrained(bases(name, **fields), dtype=dtype)
        model.base_model.save_pretrained(folder, max_shard_size="60KB")
        tiny.tokenizer(decoder=name in tiny.DECODERS).save_pretrained(folder)
        assert len(list(folder.glob("*.safetensors"))) > 1
        wanted = recipe(folder, reviews, f"model.quantize={form}", "model.dtype=bfloat16")
        ours = held(prepare(wanted, tmp_path / "work").adapted.model)
        theirs = held(foreign(folder, form))
        assert ours.keys() == theirs.keys()
        assert len(ours) >= 8
        assert all(same(storage, theirs[layer]) for layer, storage in ours.items())


def test_nothing_of_how_it_was_read_stays(bases: Bases, reviews: Path, tmp_path: Path):
    before = modeling_utils.safe_open
    for form in ("none", "int8", "nf4"):
        model = prepare(wide(bases, reviews, "bert", f"model.quantize={form}"), tmp_path / form).adapted.model
        assert modeling_utils.safe_open is before
        assert not hasattr(model, "hf_quantizer")
        assert not hasattr(model.config, "quantization_config")
        assert not getattr(model, "is_quantized", False)
        assert not any(isinstance(module, bitsandbytes.nn.Linear8bitLt) for module in model.modules())


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_weights_of_another_shape_are_refused(form: str, reviews: Path, tmp_path: Path):
    folder = tiny.base(tmp_path / "base", "bert", **WIDE["bert"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 192}))
    told = "the weights hold another shape of bert.encoder.layer.0.intermediate.dense.bias"
    with pytest.raises(ModelError, match=told):
        run(recipe(folder, reviews, f"model.quantize={form}"), tmp_path / "bundle", device_name="cpu")


@pytest.mark.parametrize("form", FORMS)
def test_a_base_that_holds_codes_already_is_taken_as_it_is(form: str, bases: Bases, reviews: Path, tmp_path: Path):
    for name, fields in WIDE.items():
        folder, kind = tmp_path / name, form.split()[0]
        model = foreign(bases(name, **fields), form)
        model.save_pretrained(folder)
        tiny.tokenizer(decoder=name in tiny.DECODERS).save_pretrained(folder)
        wanted = recipe(folder, reviews, f"model.quantize={kind}", "model.dtype=bfloat16")
        ours, theirs = held(prepare(wanted, tmp_path / "work").adapted.model), held(foreign(folder, form))
        assert ours.keys() == theirs.keys()
        assert all(same(storage, theirs[layer]) for layer, storage in ours.items())
        if kind == "nf4":
            nested = {storage.nested for storage in ours.values() if isinstance(storage, Nf4)}
            assert nested == {form == "nf4"}
        bundle = run(wanted, tmp_path / f"{name}.bundle", device_name="cpu")
        assert bundle.passport.quantize == kind
        for other in {"none", "int8", "nf4"} - {kind}:
            with pytest.raises(ModelError, match=f"holds its weights in {kind} already, so model.quantize={other}"):
                prepare(recipe(folder, reviews, f"model.quantize={other}"), tmp_path / "work")


def test_a_base_in_another_form_is_refused(bases: Bases, reviews: Path, tmp_path: Path):
    folder = tiny.base(tmp_path / "base", "bert", **WIDE["bert"])
    config = json.loads((folder / "config.json").read_text())
    for fields in ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, {"bits": 4}):
        method = {"quant_method": "gptq" if "bits" in fields else "bitsandbytes"}
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": method | fields}))
        with pytest.raises(ModelError, match=f"quantized by {method['quant_method']} in a form that is not read"):
            prepare(recipe(folder, reviews, "model.quantize=nf4"), tmp_path / "work")


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a peak anew")
@pytest.mark.parametrize("shard", ["10GB", "12MB"])
@pytest.mark.parametrize("changes", [["int8"], ["nf4"], ["int8", "model.quantize_embeddings=true"]], ids="+".join)
def test_loading_takes_little_more_than_what_is_kept(changes: list[str], shard: str, chat_bases: Bases, tmp_path: Path):
    """15 % over what is kept and the largest layer; files that are mapped add all of their 129 MB."""
    folder = tmp_path / "base"
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
    tiny_chat.base(folder, "llama", **shape, head_dim=64, vocab_size=16_000, shard=shard)
    assert bytes_of(folder) > 80 * 2**20
    small = chat_bases("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    command = [sys.executable, "-m", "tests.growth", str(small), str(folder), f"model.quantize={changes[0]}"]
    done = subprocess.run(
        [*command, *changes[1:]], capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    layer = 4 * (16_000 * 512)
    noise = 12 * 2**20
    assert found["held"] < (0.35 if changes == ["int8"] else 0.3) * bytes_of(folder)
    assert found["peak"] < 1.15 * (found["held"] + layer) + noise, found


def test_quantizing_an_empty_or_odd_weight_keeps_its_shape():
    for shape in ((0, 64), (1, 64), (3, 128)):
        for form, kind in (("int8", Int8), ("nf4", Nf4)):
            weight: Tensor = torch.randn(shape)
            if not len(weight) and form == "nf4":
                continue
            storage = quantize.quantized(weight, form)
            assert isinstance(storage, kind)
            assert storage.dequantized().shape == shape
