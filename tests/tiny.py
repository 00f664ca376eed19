"""Tiny bases with random weights, built where a test needs them: real architectures, a vocabulary of a few words."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

WORDS = "a the film plot was is very not good bad fine dull great awful warm cold long short and but".split()
GOOD = ("good", "fine", "great", "warm")
BAD = ("bad", "dull", "awful", "cold")

_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_DECODER: dict[str, Any] = _ENCODER | {"num_key_value_heads": 2, "head_dim": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
    "roberta": _ENCODER,
    "xlm-roberta": _ENCODER,
    "deberta-v2": _ENCODER
    | {
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
    },
    "electra": _ENCODER | {"embedding_size": 16},
    "albert": _ENCODER | {"embedding_size": 16},
    "modernbert": _ENCODER | {"global_attn_every_n_layers": 2, "local_attention": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": _DECODER,
    "qwen3": _DECODER,
    "gemma": _DECODER,
    "gemma3_text": _DECODER,
}
MORE: dict[str, dict[str, Any]] = {
    "deberta": _ENCODER | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64},
    "opt": _ENCODER | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": _ENCODER,
    "gemma2": _DECODER | {"final_logit_softcapping": 2.0},
    "granite": _DECODER | {"logits_scaling": 4.0},
    "hyperclovax": _DECODER | {"logits_scaling": 0.25},
    "cohere": _DECODER | {"logit_scale": 0.25},
    "falcon_h1": _DECODER
    | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "lm_head_multiplier": 0.5},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
}
"""Architectures that are not among those promised, each for a trait of its own."""
DECODERS = ("gpt2", "llama", "qwen3", "gemma", "gemma3_text", "falcon", "opt")


SEGMENTED = ("bert", "electra", "deberta-v2")
"""Architectures whose tokenizers tell which of two texts a token is of."""


def tokenizer(*, decoder: bool = False, segmented: bool = True) -> PreTrainedTokenizerFast:
    """One token a word. An encoder's adds [CLS] and [SEP] and pads; a decoder's has an end-of-text token alone."""
    special = ["<unk>", "<eos>"] if decoder else ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    unknown = special[0] if decoder else "[UNK]"
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder:
        return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    pairs = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=pairs
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", *["token_type_ids"] * segmented, "attention_mask"],
    )


def base(folder: Path, architecture: str = "bert", *, seed: int = 0, **changes: Any) -> Path:
    """Write a base of an architecture, as from a hub: an encoder or decoder without a task's head."""
    words = tokenizer(decoder=architecture in DECODERS, segmented=architecture in SEGMENTED)
    fields = (ARCHITECTURES | MORE)[architecture] | {"vocab_size": len(words)} | changes
    fields["pad_token_id"] = words.pad_token_id
    if architecture in DECODERS:
        fields |= {"bos_token_id": words.eos_token_id, "eos_token_id": words.eos_token_id}
    torch.manual_seed(seed)
    model = AutoModel.from_config(AutoConfig.for_model(architecture, **fields))
    with torch.no_grad():  # spread out, so that a text's words move its logits
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def gguf(path: Path, *, pre: str = "smollm", tied: bool = True) -> Path:
    """Write a Llama in GGUF, quantized to 4 and 8 bits, with the alphabet of bytes as its vocabulary and two merges."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "in", "ĠĠ"]
    writer = GGUFWriter(path, "llama")
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["i n", "Ġ Ġ"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}")
    wide = {"ffn_gate": (128, 64), "ffn_up": (128, 64), "ffn_down": (64, 128), "attn_k": (32, 64), "attn_v": (32, 64)}
    layer = wide | {"attn_q": (64, 64), "attn_output": (64, 64), "attn_norm": (64,), "ffn_norm": (64,)}
    shapes = {f"blk.{at}.{name}": shape for at in range(2) for name, shape in layer.items()}
    shapes |= {"token_embd": (len(tokens), 64), "output_norm": (64,)} | ({} if tied else {"output": (len(tokens), 64)})
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = random.normal(size=shape).astype(np.float32)
        kind = GGMLQuantizationType.Q8_0 if name.startswith(("token", "output")) else GGMLQuantizationType.Q4_1
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def topics(path: Path, labels: tuple[str, ...], rows: int = 240) -> Path:
    """Write a CSV in which some words in a text are its labels too, so that a perfect score can be had."""
    drawn = random.Random(1)
    others = [word for word in WORDS if word not in labels]
    lines = ["text,label"]
    for number in range(rows):
        own = [word for word in labels if drawn.random() < 0.4]
        words = [*own, *(drawn.choice(others) for _ in range(drawn.randrange(1, 5)))]
        drawn.shuffle(words)
        lines.append(f"{' '.join(words)} n{number},{';'.join(own)}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def reviews(path: Path, rows: int = 60) -> Path:
    """Write a CSV of sentences whose label follows from one word in them, of unequal lengths."""
    lines = ["text,label"]
    for number in range(rows):
        word = (GOOD if number % 2 else BAD)[number // 2 % 4]
        around = [WORDS[(number * 7 + at) % len(WORDS)] for at in range(number % 9)]
        plain = " ".join(filler for filler in around if filler not in GOOD + BAD)
        lines.append(f"the film {plain} number{number} was {word},{'good' if number % 2 else 'bad'}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
