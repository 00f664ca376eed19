"""The chunked cross-entropy against the plain one, of all that models do to their logits, and what it holds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowres_ft import behaviour, evaluate
from lowres_ft.batches import collate
from lowres_ft.tasks import _chunked
from lowres_ft.tasks.base import IGNORED, Batch
from tests import tiny_chat
from tests.conftest import Prepared, prepare

Bases = Callable[..., Path]
VOCABULARY = 512  # more than all tokenizers have


def prepared(base: Path, chats: Path, work: Path, *overrides: str, **plan: Any) -> Prepared:
    ready = prepare(tiny_chat.recipe(base, chats, "task.template=plain", *overrides), work, **plan)
    torch.manual_seed(4)
    for name, parameter in ready.adapted.trained().items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    return ready


def whole(ready: Prepared, rows: int = 8) -> Batch:
    return collate(ready.tokens["train"], np.arange(rows), ready.adapted)


def plain(ready: Prepared, batch: Batch) -> Tensor:
    """The summed cross-entropy of all that the model computes."""
    logits = ready.adapted.model(input_ids=batch.ids, attention_mask=batch.mask).logits
    return cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")


def ours(ready: Prepared, batch: Batch) -> Tensor:
    return ready.adapted.task.loss(ready.adapted.model, batch)


def gradients(
    ready: Prepared, batch: Batch, loss: Callable[[Prepared, Batch], Tensor], scale: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    ready.adapted.model.zero_grad()
    with ready.adapted.computing():
        found = loss(ready, batch)
    (found * scale).backward()
    return found.detach(), {name: p.grad.clone() for name, p in ready.adapted.trained().items() if p.grad is not None}


def require_same(found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]], rtol: float):
    torch.testing.assert_close(found[0], wanted[0], rtol=rtol, atol=0)
    assert found[1].keys() == wanted[1].keys()
    assert len(found[1]) > 2
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).norm() <= rtol * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("logits", [1, 7 * VOCABULARY, 2**30])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        *((architecture, {}) for architecture in tiny_chat.BASES),
        ("llama", {"tied": False}),
        *((architecture, {}) for architecture in ("gpt_neox", "gemma2", "granite", "hyperclovax", "cohere")),
        ("falcon_h1", {"form": "smollm2"}),
    ],
)
def test_loss_and_gradients_are_the_plain_ones(
    architecture: str,
    changes: dict[str, Any],
    method: str,
    logits: int,
    chat_bases: Bases,
    chats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(_chunked.LOGITS, "cpu", logits)
    base = chat_bases(architecture, vocab_size=VOCABULARY, **changes)
    ready = prepared(base, chats, tmp_path, f"method.kind={method}")
    batch = whole(ready)
    assert ready.adapted.model not in _chunked._UNKNOWN
    require_same(gradients(ready, batch, ours, 0.125), gradients(ready, batch, plain, 0.125), rtol=2e-6)


class Widest(TorchDispatchMode):
    """Rows of the largest tensor that is as wide as the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return found


def test_no_tensor_of_all_tokens_by_the_vocabulary_is_made(
    chat_bases: Bases, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ready = prepared(chat_bases("llama", vocab_size=VOCABULARY), chats, tmp_path)
    batch = whole(ready)
    count = int((batch.targets != IGNORED).sum())
    hidden = 32  # of the base: its weights, seen from the other side, are as wide as the vocabulary
    assert count > 2 * hidden
    monkeypatch.setitem(_chunked.LOGITS, "cpu", 7 * VOCABULARY)
    with Widest() as ours_widest:
        ours(ready, batch).backward()
        with torch.no_grad():
            ready.adapted.task.outputs(ready.adapted.model, batch)
    assert ours_widest.rows == hidden
    with Widest() as plain_widest:
        plain(ready, batch).backward()
    assert plain_widest.rows == batch.ids.numel()


def test_a_small_batch_has_few_logits_at_once(chat_bases: Bases, chats: Path, tmp_path: Path):
    ready = prepared(chat_bases("llama", vocab_size=VOCABULARY), chats, tmp_path)
    batch = whole(ready)
    most = max(64, batch.ids.numel() // 4)
    assert int((batch.targets != IGNORED).sum()) > most
    with Widest() as widest:
        ours(ready, batch).backward()
    assert widest.rows == most


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_16_bits_give_the_plain_gradients_to_rounding(
    method: str, dtype: str, chat_bases: Bases, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also with the loss scale of fp16, and where autocast holds copies of weights that are trained."""
    monkeypatch.setitem(_chunked.LOGITS, "cpu", 7 * VOCABULARY)
    base = chat_bases("llama", vocab_size=VOCABULARY)
    exact = prepared(base, chats, tmp_path / "exact", f"method.kind={method}")
    batch = whole(exact)
    wanted = gradients(exact, batch, plain, 16.0)
    ready = prepared(base, chats, tmp_path, f"method.kind={method}", f"model.dtype={dtype}")
    errors = [distance(gradients(ready, batch, loss, 16.0), wanted) for loss in (ours, plain)]
    assert errors[0] < 1.2 * errors[1] < 0.06


def distance(found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]]) -> float:
    gaps = [(found[1][name] - gradient).norm() for name, gradient in wanted[1].items()]
    return float(torch.stack(gaps).norm() / torch.stack([gradient.norm() for gradient in wanted[1].values()]).norm())


def test_a_batch_without_items_has_a_loss_and_a_gradient_of_zero(chat_bases: Bases, chats: Path, tmp_path: Path):
    ready = prepared(chat_bases(), chats, tmp_path)
    batch = whole(ready)
    batch.targets.fill_(IGNORED)
    loss, found = gradients(ready, batch, ours)
    assert loss == 0
    assert not any(gradient.any() for gradient in found.values())
    with torch.no_grad():
        assert not ready.adapted.task.outputs(ready.adapted.model, batch).any()


# What is not known


@contextmanager
def strange(ready: Prepared) -> Iterator[None]:
    """Let the model do to its logits what is not known."""

    def ban(_: Any, __: Any, found: Any) -> Any:
        found.logits = found.logits - 3.0 * torch.arange(VOCABULARY).remainder(2)
        return found

    handle = ready.adapted.model.register_forward_hook(ban)
    try:
        yield
    finally:
        handle.remove()


def test_what_is_not_known_is_computed_at_once_and_told(
    chat_bases: Bases, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ready = prepared(chat_bases("llama", vocab_size=VOCABULARY), chats, tmp_path)
    assert behaviour.revise(ready.adapted, ready.plan) == (ready.plan, ())
    monkeypatch.setattr("lowres_ft.plan._LOGITS", {"cpu": 100 * VOCABULARY})
    batch = whole(ready)
    known = gradients(ready, batch, ours)
    with strange(ready):
        plan, notes = behaviour.revise(ready.adapted, ready.plan)
        assert (plan.micro_batch_tokens, plan.evaluation_tokens) == (100, 100)
        assert notes == (
            "this base does to its logits what is not known here, so they all stand in memory: "
            "micro-batches of 100 tokens at the most",
        )
        require_same(gradients(ready, batch, ours), gradients(ready, batch, plain), rtol=2e-6)
        assert ours(ready, batch) != known[0]
        found = evaluate.outputs(ready.adapted, ready.tokens["train"], plan)
        loss = evaluate.metric(ready.adapted.task, ready.tokens["train"].truth, found)
        batch = whole(ready, len(ready.tokens["train"]))
        with torch.no_grad():
            assert loss == pytest.approx(float(plain(ready, batch) / (batch.targets != IGNORED).sum()), rel=1e-5)


def test_an_output_layer_whose_input_is_flat_is_left_alone(chat_bases: Bases, chats: Path, tmp_path: Path):
    ready = prepared(chat_bases("llama", vocab_size=VOCABULARY), chats, tmp_path)
    model, batch = ready.adapted.model, whole(ready)
    wanted = gradients(ready, batch, plain)

    def flat(**given: Any) -> SimpleNamespace:
        states = model.model(**given).last_hidden_state
        return SimpleNamespace(logits=model.lm_head(states.flatten(0, 1)).unflatten(0, states.shape[:2]))

    model.forward = flat
    require_same(gradients(ready, batch, ours), wanted, rtol=2e-6)
    assert model in _chunked._UNKNOWN
