"""What a loaded model must do whatever its name: answer alike beside longer texts, and write from left to right."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowres_ft.errors import ModelError
from lowres_ft.tasks.base import Batch

if TYPE_CHECKING:
    from lowres_ft.model import Adapted


def require(adapted: "Adapted") -> None:
    """Refuse a model whose answers would be wrong without a sign.

    Raises:
        ModelError: It sees what it is to write, or answers differently when a text is padded.
    """
    if adapted.task.generates:
        _require_causal(adapted)
    _require_padding_without_effect(adapted)


def _require_padding_without_effect(adapted: "Adapted") -> None:
    """Refuse a model that answers differently when a text stands padded beside a longer one.

    Told by the difference that padding makes to a text, against the difference to another text.

    Raises:
        ModelError: Padding changes the answer, as with XLNet, which looks at the last position.
    """
    special = set(adapted.tokenizer.all_special_ids)
    plain = [index for index in range(len(adapted.tokenizer)) if index not in special]
    words = [plain[len(plain) * at // 12] for at in range(12)]
    short, long = torch.tensor([words[:4]]), torch.tensor([words[4:]])
    padded = torch.full_like(long, adapted.tokenizer.pad_token_id or 0)
    padded[:, :4] = short
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, 4:] = 0
    alone = _answers(adapted, short, torch.ones_like(short))
    together = _answers(adapted, torch.cat([padded, long]), mask)
    same = together[:, : alone.shape[1]]
    if (alone[0] - same[0]).norm() > 0.25 * (same[0] - same[1]).norm() + 1e-6:
        kind = adapted.base.config().get("model_type")
        raise ModelError(
            f"{adapted.base.source} (model_type {kind!r}) answers differently when a text is padded on the right",
            hint="Its answers would depend on what stands beside a text; choose another base.",
        )


def _require_causal(adapted: "Adapted") -> None:
    """Refuse a model that sees what it is to write, such as BERT as a language model.

    Raises:
        ModelError: It has no output layer, or a later word changes what it expects at an earlier one.
    """
    ids = torch.arange(8, device=adapted.device).repeat(3, 1) + len(adapted.tokenizer) // 2  # (3, 8)
    ids[1, 4:] += 4
    ids[2, 0] += 4
    with torch.inference_mode(), adapted.computing():
        logits = adapted.model(input_ids=ids, use_cache=False).logits[:, :4].float()
    later, earlier = ((logits[0] - logits[changed]).norm() for changed in (1, 2))
    if adapted.model.get_output_embeddings() is None or later > 0.05 * earlier + 1e-6:
        kind = adapted.base.config().get("model_type")
        raise ModelError(
            f"{adapted.base.source} (model_type {kind!r}) does not write from left to right, so it cannot chat",
            hint="Use a causal language model.",
        )


def _answers(adapted: "Adapted", ids: Tensor, mask: Tensor) -> Tensor:
    """(B, ...) logits for token ids (B, T)."""
    rows = torch.arange(len(ids))
    batch = Batch(*(part.to(adapted.device) for part in (ids, mask, rows[:, None], rows)))
    was_training = adapted.model.training
    adapted.model.eval()
    with torch.inference_mode(), adapted.computing():
        found: Tensor = adapted.task.logits(adapted.model, batch).float()
    adapted.model.train(was_training)
    return found
