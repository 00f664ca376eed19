"""Bases with random weights in the shapes of known models, and texts of a given length.

What it needs is imported after lowres_ft, which sets what PyTorch reads before its first tensor.
"""

import json
import random
from pathlib import Path
from typing import Any

from lowres_ft.recipe import Recipe, parse

_STEP = 4096  # tokens of a step: two micro-batches of a plan for a processor
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_TEMPLATE = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
_SPECIAL = ("<|pad|>", "<|start|>", "<|end|>")


def _bert(hidden: int, layers: int, heads: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "vocab_size": vocabulary,
        "max_position_embeddings": 514,
        **more,
    }


def _llama(
    hidden: int, inner: int, layers: int, heads: tuple[int, int], vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        **more,
    }


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-mini": ("bert", _bert(256, 4, 4, 30_522)),
    "minilm": ("bert", _bert(384, 6, 12, 30_522)),
    "bert-base": ("bert", _bert(768, 12, 12, 30_522)),
    "distilbert": (
        "distilbert",
        {"dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072, "vocab_size": 30_522},
    ),
    "roberta-small": ("roberta", _bert(512, 6, 8, 50_265)),
    "roberta-base": ("roberta", _bert(768, 12, 12, 50_265)),
    "xlm-r-minilm": ("xlm-roberta", _bert(384, 12, 12, 250_002)),
    "deberta-small": (
        "deberta-v2",
        _bert(384, 6, 6, 60_000)
        | {
            "relative_attention": True,
            "position_buckets": 256,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
        },
    ),
    "modernbert-small": (
        "modernbert",
        _bert(512, 10, 8, 50_368, intermediate_size=768, global_attn_every_n_layers=3),
    ),
    "modernbert-base": (
        "modernbert",
        _bert(768, 22, 12, 50_368, intermediate_size=1152, global_attn_every_n_layers=3),
    ),
    "llama-small": ("llama", _llama(384, 1024, 8, (6, 2), 32_000)),
    "smollm2": ("llama", _llama(576, 1536, 30, (9, 3), 49_152)),
    "qwen3-small": ("qwen3", _llama(512, 1536, 12, (8, 4), 100_000, head_dim=64)),
    "gemma3-small": ("gemma3_text", _llama(512, 2048, 10, (4, 1), 80_000, head_dim=128, sliding_window=256)),
}
"""Model type and config fields; smollm2, bert-base and their like have the sizes of those."""
LARGE: dict[str, tuple[str, dict[str, Any]]] = {"llama-1b": ("llama", _llama(2048, 5632, 24, (32, 8), 512))}
"""2 GiB in bf16, nearly all of them in layers."""
_WRITERS = ("llama", "qwen3", "gemma3_text")


def write_base(name: str, folder: Path, dtype: str = "float32") -> None:
    """Write a base of a shape, its weights random, with a tokenizer of single letters."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    kind, fields = (SHAPES | LARGE)[name]
    words = _tokenizer()
    torch.manual_seed(0)
    ids = {"pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id}
    config = AutoConfig.for_model(kind, **fields, **ids)
    made = (AutoModelForCausalLM if kind in _WRITERS else AutoModel).from_config(config, dtype=getattr(torch, dtype))
    made.save_pretrained(folder)
    words.save_pretrained(folder)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    pad, start, end = _SPECIAL
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, bos_token=start, eos_token=end)
    made.chat_template = _TEMPLATE
    return made


def write_rows(path: Path, task: str, length: int, count: int) -> None:
    """Write rows, half of which are cut at `length` tokens and the others shorter."""
    drawn = random.Random(1)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            letters = 2 * length if number % 4 < 2 else drawn.randrange(8, length)
            text = "".join(drawn.choices(_LETTERS, k=letters))
            file.write(json.dumps(_row(task, text, number)) + "\n")


def _row(task: str, text: str, number: int) -> dict[str, Any]:
    if task == "chat":
        question = {"role": "user", "content": f"{number}?"}
        return {"messages": [question, {"role": "assistant", "content": text}]}
    if task == "ner":
        return {"text": text, "entities": [{"start": 0, "end": len(text), "label": ("a", "b")[number % 2]}]}
    return {"text": text, "label": ("a", "b")[number % 2]}


def recipe(base: Path, rows: Path, task: str, length: int, *changes: str) -> Recipe:
    """A recipe of LoRA on all linear layers over such rows, with `changes`."""
    kinds: dict[str, dict[str, Any]] = {"chat": {"samples": 1, "max_new_tokens": 4}}
    raw = {
        "name": "memory",
        "task": {"kind": task, "max_length": length, **kinds.get(task, {"labels": ["a", "b"]})},
        "model": {"base": str(base)},
        "method": {"kind": "lora", "rank": 16},
        "data": {"train": str(rows), "validation": 0.2, "test": None},
        "train": {"steps": 4, "batch_size": max(8, min(32, _STEP // length))},
    }
    return parse(raw, changes)
