"""Tiny chat bases with random weights: tokenizers of bytes, and the chat templates of known models in their form."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lowres_ft.recipe import Recipe, parse
from tests import tiny

SENTENCES = (
    "What is your name? My name is assistant, and I was made in a test.",
    "The user asks a question; the assistant gives an answer.\nIt ends its turn.",
    "How do you do? I do well, thank you. And you? Not bad at all.",
    "Écoute, c'est très bien: naïve, déjà vu. 你好世界。 Ölçü birimi nedir?",
)
_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
TEMPLATES = {
    "smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
        "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        "+ message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "qwen3": (
        "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
        "{%- endif %}{%- set ns = namespace(last_query_index=messages|length - 1) %}"
        "{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last_query_index = loop.index0 %}"
        "{%- endif %}{%- endfor %}{%- for message in messages %}"
        "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
        "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
        "{%- elif message.role == 'assistant' %}{%- set content = message.content %}{%- set reasoning_content = '' %}"
        "{%- if '</think>' in content %}"
        "{%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
        "{%- if loop.index0 > ns.last_query_index %}{%- if loop.last or (not loop.last and reasoning_content) %}"
        "{{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n'"
        " + content.lstrip('\n') }}{%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}"
        "{%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}"
        "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}"
        "{%- endif %}{%- endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}" + _ALTERNATE + "{% if (message['role'] == 'assistant') %}"
        "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
    ),
}
"""By the model that is known for it."""
_SPECIAL: dict[str, dict[str, str]] = {
    "smollm2": {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    },
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
    "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
}
_MORE = {
    "llama3": ["<|start_header_id|>", "<|end_header_id|>"],
    "qwen3": ["<|im_start|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
}
END = {"smollm2": "<|im_end|>", "llama3": "<|eot_id|>", "qwen3": "<|im_end|>", "gemma": "<end_of_turn>"}
"""The token that ends a turn."""
BASES = {"llama": "smollm2", "qwen3": "qwen3", "gemma": "gemma", "gemma3_text": "gemma", "gpt2": "gpt2"}
"""The tokenizer of each architecture."""
CHATS = tuple(
    {"messages": [{"role": "user", "content": f"What is {n} and {n + 1}?"}, {"role": "assistant", "content": answer}]}
    for n in range(24)
    for answer in [f"It is {2 * n + 1}, my friend." if n % 3 else f"{2 * n + 1}"]
)


def tokenizer(form: str = "smollm2") -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, as those of the model whose template is called `form`; GPT-2's has no template."""
    special = [*dict.fromkeys(_SPECIAL[form].values()), *_MORE.get(form, ())]
    backend = _pieces(special) if form == "gemma" else _bytes(special)
    if form == "llama3":  # leaves the space before a word out of the word's offsets
        bos = ("<|begin_of_text|>", special.index("<|begin_of_text|>"))
        backend.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos]),
            ]
        )
    if form == "qwen3":
        backend.normalizer = normalizers.NFC()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **_SPECIAL[form], extra_special_tokens=_MORE.get(form, []))
    if form == "qwen3":
        made.add_tokens(["<think>", "</think>"])
    made.chat_template = TEMPLATES.get(form)
    return made


def _bytes(special: list[str]) -> Tokenizer:
    """Byte-level BPE, like GPT-2's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=330 + len(special),
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return backend


def _pieces(special: list[str]) -> Tokenizer:
    """BPE of characters with bytes for those that are unknown, like Gemma's."""
    learned = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    learned.train_from_iterator([text.replace(" ", "▁") for text in SENTENCES], trainer)
    held = json.loads(learned.to_str())["model"]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *(n for n in held["vocab"] if n not in special)]
    merges = [tuple(pair) for pair in held["merges"]]
    backend = Tokenizer(
        models.BPE({name: index for index, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bos = ("<bos>", special.index("<bos>"))
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    return backend


def base(
    folder: Path,
    architecture: str = "llama",
    *,
    form: str | None = None,
    tied: bool = True,
    shard: str = "10GB",
    **changes: Any,
) -> Path:
    """Write a whole language model, as it is published."""
    words = tokenizer(form or BASES.get(architecture, "smollm2"))
    positions = "n_positions" if architecture == "gpt2" else "max_position_embeddings"
    fields = (tiny.ARCHITECTURES | tiny.MORE)[architecture] | {positions: 256, "vocab_size": len(words)}
    fields |= {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **(fields | {"pad_token_id": words.pad_token_id} | changes))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    words.save_pretrained(folder)
    return folder


def chats(path: Path, rows: Any = CHATS) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(base: Path, data: Path, *overrides: str) -> Recipe:
    """A recipe on a tiny chat base: two steps of LoRA in fp32, unless overridden."""
    raw = {
        "name": "tiny-chat",
        "task": {"kind": "chat", "max_length": 96, "max_new_tokens": 8, "samples": 2},
        "model": {"base": str(base), "dtype": "float32"},
        "method": {"kind": "lora", "rank": 4},
        "data": {"train": str(data), "probe_rows": 2},
        "train": {"steps": 2, "batch_size": 4, "learning_rate": 0.01},
    }
    return parse(raw, overrides)
