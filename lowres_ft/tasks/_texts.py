"""Texts and pairs of texts, as cells hold them and as tokenizers take them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lowres_ft.errors import DataError, ModelError
from lowres_ft.tasks._labels import quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def one(row: Mapping[str, Any], role: str, where: str) -> str:
    """The text that the cell of a role holds.

    Raises:
        DataError: It holds none.
    """
    text = row[role]
    if text is None or (isinstance(text, str) and not text.strip()):
        raise DataError(f"{where}: the {role} is empty")
    if not isinstance(text, str):
        raise DataError(f"{where}: the {role} is {quoted(text)}, which is not text")
    return text


def require_pairs(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer that puts nothing between two texts, as those of most language models do.

    Raises:
        ModelError: It does.
    """
    special = [tokenizer.num_special_tokens_to_add(pair=pair) for pair in (True, False)]
    if special[0] <= special[1]:
        raise ModelError(
            "this base's tokenizer puts nothing between the two texts of a pair, so they would run into one",
            hint="Use an encoder such as BERT's or RoBERTa's kin; or join both texts in one column yourself, with a "
            "sign between them, and leave out task.pairs.",
        )
