"""GGUF files become the models that transformers reads from them, with the tokenizer that was trained."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowres_ft import gguf
from lowres_ft.files import sha256
from tests import tiny


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_are_those_that_transformers_reads(tmp_path: Path, tied: bool):
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny.gguf(tmp_path / "a.gguf", tied=tied).parent, gguf_file="a.gguf", dtype=torch.float32
    )
    gguf.convert(tmp_path / "a.gguf")
    ours, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert ours.dtype == torch.float32
    assert ours.config.tie_word_embeddings is tied
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    for name, values in theirs.state_dict().items():
        assert torch.equal(values, ours.state_dict()[name]), name
    ids = torch.arange(12)[None]
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits)
    assert (ours.generation_config.eos_token_id, ours.generation_config.pad_token_id) == (2, 2)


def test_the_tokenizer_is_smollms(tmp_path: Path):
    gguf.convert(tiny.gguf(tmp_path / "a.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    split = {
        "in  12": ["in", "ĠĠ", "1", "2"],  # where byte-level BPE alone would give Ġ, Ġ, 1, 2
        " in": ["Ġ", "in"],
        "<|im_start|>in<|im_end|>": ["<|im_start|>", "in", "<|im_end|>"],
        "é": ["Ã", "©"],
        "": [],
    }
    assert {text: tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) for text in split} == split
    assert all(tokenizer.decode(tokenizer(text)["input_ids"]) == text for text in split)
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer.model_max_length == 128
    said = [{"role": "user", "content": "in"}]
    assert tokenizer.apply_chat_template(said, tokenize=False) == "<|im_start|>in<|im_end|>"


def test_a_folder_remembers_its_origin(tmp_path: Path):
    digest = sha256(tiny.gguf(tmp_path / "a.gguf"))
    gguf.convert(tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()
    weights = sha256(tmp_path / "model.safetensors")
    assert gguf.origin(tmp_path, weights) == digest
    assert gguf.origin(tmp_path, "0" * 64) == "0" * 64
    assert gguf.origin(tmp_path / "elsewhere", weights) == weights


def test_the_same_gguf_becomes_the_same_files(tmp_path: Path):
    hashes = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        gguf.convert(tiny.gguf(tmp_path / name / "a.gguf"))
        hashes.append({path.name: sha256(path) for path in (tmp_path / name).iterdir()})
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 6


def test_another_kind_of_model_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"a\.gguf is llama / gpt2 / llama-bpe, not llama / gpt2 / smollm"):
        gguf.convert(tiny.gguf(tmp_path / "a.gguf", pre="llama-bpe"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
