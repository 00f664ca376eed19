"""GGUF files as plain transformers folders: weights, configuration, tokenizer, and where they came from.

Written by ourselves: transformers can read such weights but not save them, and its tokenizer for them splits numbers
otherwise than the model was trained on.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowres_ft.files import sha256

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, ReaderTensor

_ORIGIN = "origin.json"
_WEIGHTS = "model.safetensors"
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
"""A special token's role in transformers, and what GGUF calls it."""
_CONTROL = 3  # the type of a token that no text contains


def convert(path: Path) -> None:
    """Replace a GGUF file by the files of a transformers model, in its folder.

    Raises:
        ValueError: It is no Llama with SmolLM's tokenizer, the only kind that is understood.
    """
    reader = _reader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    kind = (fields["general.architecture"], fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"])
    if kind != ("llama", "gpt2", "smollm"):
        raise ValueError(f"{path.name} is {' / '.join(kind)}, not llama / gpt2 / smollm")
    folder = path.parent
    _write_weights(folder / _WEIGHTS, reader, fields)
    ids = {f"{role}_token_id": fields[f"tokenizer.ggml.{_ROLES[role]}_token_id"] for role in ("bos", "eos", "pad")}
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    _write_json(folder / "config.json", _config(fields) | ids | {"tie_word_embeddings": tied})
    _write_json(folder / "generation_config.json", ids)
    _write_tokenizer(folder, fields)
    converted = {_WEIGHTS: sha256(folder / _WEIGHTS)}
    _write_json(folder / _ORIGIN, {"file": path.name, "sha256": sha256(path), "converted": converted})
    path.unlink()


def _reader(path: Path) -> "GGUFReader":
    """What reads a GGUF file; gguf's own goes on beyond the end of a file, as long as its lists say they are."""
    from gguf import GGUFReader

    class Reader(GGUFReader):  # type: ignore[misc]
        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **options: Any) -> Any:
            found = super()._get(offset, dtype, count, *order, **options)
            if len(found) < count:
                raise ValueError("the file ends early")
            return found

    return Reader(path)


def origin(folder: Path, weights: str) -> str:
    """The hash by which a base's weights are known: that of the GGUF from which they were made, else their own."""
    try:
        noted = json.loads((folder / _ORIGIN).read_text(encoding="utf-8"))
        return str(noted["sha256"]) if noted["converted"] == {_WEIGHTS: weights} else weights
    except (OSError, ValueError, KeyError, TypeError):
        return weights


def _config(fields: Mapping[str, Any]) -> dict[str, Any]:
    from numpy import float32

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "vocab_size": fields["llama.vocab_size"],
        "rms_norm_eps": float(str(float32(fields["llama.attention.layer_norm_rms_epsilon"]))),  # 1e-5, kept in 32 bits
        "rope_theta": fields["llama.rope.freq_base"],
        "torch_dtype": "float32",
    }


def _write_weights(path: Path, reader: "GGUFReader", fields: Mapping[str, Any]) -> None:
    """Write the weights tensor by tensor, in fp32: the products and sums that they were quantized to need its bits."""
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    tensors = {_name(tensor.name): tensor for tensor in reader.tensors}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        shape = [int(size) for size in reversed(tensors[name].shape)]
        begin, end = end, end + 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            file.write(_values(tensors[name], heads).tobytes())


def _name(name: str) -> str:
    """What transformers calls a tensor."""
    *layer, part, kind = name.split(".")
    return ".".join(["model.layers", layer[1], _IN_LAYER[part], kind] if layer else [_WHOLE[part], kind])


def _values(tensor: "ReaderTensor", heads: Mapping[str, int]) -> "np.ndarray[Any, Any]":
    """A tensor's values in fp32, its rows in transformers' order.

    The pairs of rows that the position rotates stand side by side in a GGUF, in transformers half a head apart.
    """
    import numpy as np
    from gguf.quants import dequantize

    values = dequantize(tensor.data, tensor.tensor_type).astype("<f4", copy=False)
    count = heads.get(tensor.name.split(".")[-2])
    if count is not None:
        rows, width = values.shape
        values = values.reshape(count, rows // count // 2, 2, width).swapaxes(1, 2).reshape(rows, width)
    return np.ascontiguousarray(values)


def _write_tokenizer(folder: Path, fields: Mapping[str, Any]) -> None:
    """Write SmolLM's tokenizer: byte-level BPE in which every digit is a token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {f"{role}_token": tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for role, name in _ROLES.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }
    _write_json(folder / "tokenizer_config.json", roles | config)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
