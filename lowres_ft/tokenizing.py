"""Tokenizers of folders that anybody may have written."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lowres_ft import libraries
from lowres_ft.bases import VOCABULARIES, require_no_code
from lowres_ft.errors import ModelError, first_line

_ANY_TEXT = "No word that is known: \ufeff\u202e \u00e9\U0001f600"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; where it has no padding token, the end-of-text token pads (and is masked).

    Raises:
        ModelError: It cannot be loaded, or has no token to pad with.
    """
    if not any(any(folder.glob(pattern)) for pattern in VOCABULARIES):  # transformers would make an empty tokenizer
        raise ModelError(f"{folder} holds no tokenizer: none of {', '.join(VOCABULARIES)}")
    require_no_code(folder)
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
