"""Embeddings and output layers in int8: the rows and products of the weights they stand for, in every architecture."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowres_ft import device, embedding
from lowres_ft.embedding import Int8Embedding
from lowres_ft.errors import ModelError, RecipeError
from lowres_ft.linear import AdaptedLinear
from lowres_ft.merging import merge
from lowres_ft.model import Adapted
from lowres_ft.pipeline import run
from lowres_ft.prediction import evaluate_bundle
from lowres_ft.storage import Int8
from tests import tiny, tiny_chat
from tests.conftest import prepare, recipe
from tests.test_methods import WIDE, wide
from tests.test_round_trip import TEXTS, compare, in_fresh_process

Bases = Callable[..., Path]
CPU = device.find("cpu")
QUANTIZED = ("model.quantize=int8", "model.quantize_embeddings=true")


def made_plain(adapted: Adapted) -> None:
    """Put the weights that int8 stands for in its place, as layers of PyTorch."""
    model = adapted.model
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Int8Embedding):
            rows, factor = layer.storage.dequantized(adapted.dtype), layer.factor
            plain: nn.Module = nn.Embedding.from_pretrained(rows)
            if factor is not None:
                plain.register_forward_hook(lambda _, __, found, factor=factor: found * factor)
            model.set_submodule(name, plain)
        elif isinstance(layer, AdaptedLinear) and name.endswith("lm_head"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight = nn.Parameter(layer.storage.dequantized(adapted.dtype), requires_grad=False)
            model.set_submodule(name, plain)


def logits(adapted: Adapted) -> Tensor:
    with torch.inference_mode():
        found: Tensor = adapted.model(input_ids=torch.tensor([[5, 6, 7, 8], [9, 8, 7, 5]])).logits
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_architecture_reads_the_rows_that_int8_stands_for(dtype: str, bases: Bases, reviews: Path, tmp_path: Path):
    for name in tiny.ARCHITECTURES:
        adapted = prepare(recipe(bases(name), reviews, *QUANTIZED, f"model.dtype={dtype}"), tmp_path / name).adapted
        layers = [layer for layer in adapted.model.modules() if isinstance(layer, Int8Embedding)]
        assert [layer.weight.dtype for layer in layers] == [torch.int8], name
        before = logits(adapted)
        made_plain(adapted)
        assert torch.equal(before, logits(adapted)), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", tiny_chat.BASES)
def test_a_writers_output_layer_computes_from_the_same_codes_where_it_is_tied(
    architecture: str, tied: bool, chat_bases: Bases, chats: Path, tmp_path: Path
):
    plain = ["task.template=plain"] if architecture == "gpt2" else []
    wanted = tiny_chat.recipe(chat_bases(architecture, tied=tied), chats, *QUANTIZED, *plain)
    adapted = prepare(wanted, tmp_path / "work").adapted
    words, output = adapted.model.get_input_embeddings(), adapted.model.get_output_embeddings()
    assert isinstance(words, Int8Embedding)
    assert isinstance(output, AdaptedLinear)
    assert isinstance(output.storage, Int8)
    assert (output.storage is words.storage) == tied
    assert output.weight.shape == words.weight.shape
    before = logits(adapted)
    made_plain(adapted)
    torch.testing.assert_close(before, logits(adapted), rtol=1e-5, atol=1e-5)


def test_what_is_not_the_base_stays_as_it_is(bases: Bases, reviews: Path, tmp_path: Path):
    adapted = prepare(recipe(bases("bert"), reviews, *QUANTIZED), tmp_path).adapted
    held = [name for name, module in adapted.model.named_modules() if isinstance(module, Int8)]
    assert len([name for name in held if "embeddings" in name]) == 1  # of words, not of positions
    assert not any("classifier" in name for name in held)
    assert adapted.model.classifier.weight.dtype == torch.float32


def test_beside_nf4_they_are_in_int8(bases: Bases, reviews: Path, tmp_path: Path):
    adapted = prepare(wide(bases, reviews, "llama", "model.quantize=nf4", QUANTIZED[1]), tmp_path).adapted
    assert isinstance(adapted.model.get_input_embeddings().storage, Int8)


def test_bundles_round_trip(bases: Bases, reviews: Path, tmp_path: Path):
    """PEFT's client has the embeddings as they were published, so its logits are near, not equal."""
    wanted = {name: wide(bases, reviews, name, *QUANTIZED) for name in WIDE}
    wanted["loftq"] = wide(bases, reviews, "bert", *QUANTIZED, "method.init=loftq")
    for name, folder in compare(wanted, tmp_path, tolerance=0.2).items():
        card = (folder / "README.md").read_text()
        assert "base and embeddings in int8" in card
        assert "with its embeddings as they were published" in card
        bundle = run(wanted[name], tmp_path / f"{name}.again", device_name="cpu")
        assert bundle.recipe.model.quantize_embeddings
        assert bundle.verify(CPU).exact
        merged = merge(bundle, tmp_path / f"{name}.merged", CPU)
        assert merged.largest_difference <= 1e-4
        assert merged.from_measured is not None
        assert merged.from_measured > 1e-4


def test_chat_bundles_round_trip(chat_bases: Bases, chats: Path, tmp_path: Path):
    folders = {}
    for name in ("llama", "gemma3_text"):
        for tied in (True, False):
            wanted = tiny_chat.recipe(chat_bases(name, tied=tied), chats, *QUANTIZED)
            bundle = run(wanted, tmp_path / f"{name}{tied}", device_name="cpu")
            folders[f"{name}{tied}"] = bundle.folder
            assert bundle.verify(CPU).exact
            (tmp_path / f"{name}{tied}.work").mkdir()
            scores = evaluate_bundle(bundle, *bundle.load(CPU), tmp_path / f"{name}{tied}.work")
            assert scores.to_json() == json.loads((bundle.folder / "report.json").read_text())["scores"]["test"]
            assert merge(bundle, tmp_path / f"{name}{tied}.merged", CPU).flipped == 0
    found = in_fresh_process(list(folders.values()), TEXTS)
    for name, folder in folders.items():
        seen = found[str(folder)]
        np.testing.assert_allclose(seen["theirs"], seen["ours"], atol=0.3, rtol=0, err_msg=name)
        assert seen["same_prompts"], name


def test_a_kind_of_embedding_that_int8_cannot_stand_in_for_is_refused(
    bases: Bases, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Odd(nn.Embedding):
        pass

    adapted = prepare(recipe(bases("bert"), reviews), tmp_path).adapted
    adapted.model.set_input_embeddings(Odd(4, 4))
    with pytest.raises(ModelError, match=r"quantize_embeddings: this base has a Odd, which int8 cannot stand in for"):
        embedding.layers(adapted.model)


def test_they_need_a_quantized_base(bases: Bases, reviews: Path):
    with pytest.raises(RecipeError, match=r"model.quantize_embeddings: is for a base in int8 or nf4; set model.quant"):
        recipe(bases(), reviews, "model.quantize_embeddings=true")
