"""What a loaded model must do whatever its name: answer alike beside longer texts, and write from left to right."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowres_ft import plan as plans
from lowres_ft.errors import ModelError
from lowres_ft.plan import Plan
from lowres_ft.tasks import _chunked
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


def revise(adapted: "Adapted", plan: Plan) -> tuple[Plan, tuple[str, ...]]:
    """The plan without what the loaded model cannot do, and sentences that tell it."""
    notes = []
    if adapted.task.generates and not _logits_are_known(adapted):
        vocabulary = int(adapted.model.config.get_text_config().vocab_size)
        plan = plans.for_whole_logits(plan, vocabulary)
        notes.append(
            "this base does to its logits what is not known here, so they all stand in memory: "
            f"micro-batches of {plan.micro_batch_tokens} tokens at the most"
        )
    if plan.packing and not (adapted.task.packs and _keeps_packed_apart(adapted)):
        plan = plan.model_copy(update={"packing": False})
        notes.append("sequences that share a row would see each other here, so each has a row of its own")
    return plan, tuple(notes)


def _logits_are_known(adapted: "Adapted") -> bool:
    """Whether the loss can be computed from a chunk of logits at a time."""
    with _asked(adapted):
        return _chunked.bounded(adapted.model, _batch(adapted, _words(adapted, range(3))))


def _keeps_packed_apart(adapted: "Adapted") -> bool:
    """Whether a sequence gets the logits beside another one in its row that it gets alone.

    Told by the difference that the other one and the place make, against the difference that a word of its own makes. A
    mask leaves nothing of the other one, where FalconH1's recurrent layers hand on a hundredth.
    """
    own, changed = _words(adapted, range(6)), _words(adapted, [11, *range(1, 6)])
    others = torch.cat([_words(adapted, [6, 7, 8, 9]), _words(adapted, [9, 3, 10, 7])])
    packed = _batch(adapted, torch.cat([others, own.repeat(2, 1)], dim=1))
    places = torch.tensor([*range(4), *range(6)], device=adapted.device).repeat(2, 1)
    first, second = _every(adapted, replace(packed, places=places))[:, 4:]
    alone, another = _every(adapted, _batch(adapted, torch.cat([own, changed])))
    most = (alone - another)[1:].norm()
    return bool((first - second).norm() <= 1e-3 * most and (first - alone).norm() <= 0.1 * most)


def _every(adapted: "Adapted", batch: Batch) -> Tensor:
    """(B, T, V) logits of a few words."""
    with _asked(adapted):
        return _chunked.logits(adapted.model, batch, batch.mask.bool()).view(*batch.ids.shape, -1)


def _require_padding_without_effect(adapted: "Adapted") -> None:
    """Refuse a model that answers differently when a text stands padded beside a longer one.

    Told by the difference that padding makes to a text, against the difference to another text.

    Raises:
        ModelError: Padding changes the answer, as with XLNet, which looks at the last position.
    """
    short, long = _words(adapted, range(4)), _words(adapted, range(4, 12))
    padded = torch.full_like(long, adapted.tokenizer.pad_token_id or 0)
    padded[:, :4] = short
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, 4:] = 0
    with _asked(adapted):
        alone = adapted.task.logits(adapted.model, _batch(adapted, short)).float()
        together = adapted.task.logits(adapted.model, _batch(adapted, torch.cat([padded, long]), mask)).float()
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


def _words(adapted: "Adapted", numbers: Iterable[int]) -> Tensor:
    """(1, T) token ids of plain words, by their numbers from 0 to 11."""
    special = set(adapted.tokenizer.all_special_ids)
    plain = [index for index in range(len(adapted.tokenizer)) if index not in special]
    return torch.tensor([[plain[len(plain) * number // 12] for number in numbers]])


def _batch(adapted: "Adapted", ids: Tensor, mask: Tensor | None = None) -> Batch:
    """Token ids (B, T) as a batch; there is no padding where no mask is given."""
    rows = torch.arange(len(ids))
    parts = (ids, torch.ones_like(ids) if mask is None else mask, ids, rows)
    return Batch(*(part.to(adapted.device) for part in parts))


@contextmanager
def _asked(adapted: "Adapted") -> Iterator[None]:
    """Ask a model as it answers in use."""
    was_training = adapted.model.training
    adapted.model.eval()
    with torch.inference_mode(), adapted.computing():
        yield
    adapted.model.train(was_training)
