"""Tokenizers of folders that anybody may have written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lowres_ft import foreign, libraries
from lowres_ft.bases import VOCABULARIES, require_no_code
from lowres_ft.errors import ModelError, first_line

_CONFIG = "tokenizer_config.json"
_TOKENS = (_CONFIG, "special_tokens_map.json", "added_tokens.json")
_LARGEST_FILE = 1 << 24  # bytes: hundreds of thousands of tokens may be added to a vocabulary
_LONGEST_TOKEN = 1000  # characters: tokenizers takes seconds for one of 100,000
_ANY_TEXT = "No word that is known: \ufeff\u202e \u00e9\U0001f600"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; where it has no padding token, the end-of-text token pads (and is masked).

    Raises:
        ModelError: It cannot be loaded, or has no token to pad with.
    """
    if not any(any(folder.glob(pattern)) for pattern in VOCABULARIES):  # transformers would make an empty tokenizer
        raise ModelError(f"{folder} holds no tokenizer: none of {', '.join(VOCABULARIES)}")
    require_no_code(folder)
    _require_short_tokens(folder)
    try:
        with libraries.silent():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            for pair in ((), ([_ANY_TEXT],)):  # a broken one may load, and fail at its first text
                tokenizer([_ANY_TEXT], *pair)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of tokenizers, in Rust
            raise
        raise ModelError(f"{folder}: no tokenizer can be loaded: {first_line(error)}") from error
    _require_unknown(tokenizer, folder)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"{folder}: the tokenizer has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _require_short_tokens(folder: Path) -> None:
    """Refuse tokens that no text holds, and that would take long to add to a vocabulary.

    Raises:
        ModelError: There is one, or a file cannot be read.
    """
    for path in (folder / name for name in _TOKENS):
        if path.is_file():
            found = foreign.read_json(path, _LARGEST_FILE, ModelError)
            held = {name: value for name, value in found.items() if "token" in name or path.name != _CONFIG}
            if (longest := max(map(len, _texts(held)), default=0)) > _LONGEST_TOKEN:
                raise ModelError(
                    f"{path} holds a text of {longest:,} characters where tokens are named",
                    hint=f"No token may be longer than {_LONGEST_TOKEN:,}.",
                )


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts within plain values, names among them, however deep they lie."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, list | dict):
            left += one
            left += one.values() if isinstance(one, dict) else ()


def _require_unknown(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuse a tokenizer whose token for unknown words is unknown: transformers looks it up without end.

    Raises:
        ModelError: It is one.
    """
    try:
        _ = tokenizer.unk_token_id
    except RecursionError as error:
        told = f"{folder}: the tokenizer's unk_token {tokenizer.unk_token!r} is not in its vocabulary"
        raise ModelError(told, hint="Name one that is, in tokenizer_config.json.") from error
