"""Packing: which sequences share a row, and the same losses and gradients as unpacked."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowres_ft import behaviour
from lowres_ft.attempt import Attempt
from lowres_ft.batches import in_memory, steps
from lowres_ft.packing import collate_packed, pack
from lowres_ft.tasks.base import IGNORED, Encoded
from lowres_ft.train import train
from tests import tiny_chat
from tests.conftest import Prepared, prepare, recipe

Bases = Callable[..., Path]
PACKED = ("llama", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox")
SEEN = ("opt", "falcon", "falcon_h1")
"""Architectures that would let packed sequences see each other."""


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short conversations, several of which fit beside each other into a row as long as one of the long ones."""
    long = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"It is {n}. " * 30}]}
        for n in range(100, 105)
    ]
    return tiny_chat.chats(tmp_path_factory.mktemp("data") / "chats.jsonl", [*tiny_chat.CHATS, *long])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 300), st.integers(0, 100))
@settings(max_examples=200, deadline=None)
def test_each_sequence_has_its_place_and_rows_keep_to_their_width(given: list[int], most: int, more: int):
    lengths = np.array([*given, 40])
    positions = np.random.default_rng(more).permutation(len(given))
    parts = list(pack(positions, lengths, most))
    assert sorted(int(at) for rows in parts for row in rows for at in row) == list(range(len(given)))
    fills = [[int(lengths[row].sum()) for row in rows] for rows in parts]
    assert all(fill <= 40 for part in fills for fill in part)
    assert all(len(part) == 1 or len(part) * max(part) <= most for part in fills)
    flat = [fill for part in fills for fill in part]
    assert flat == sorted(flat, reverse=True)
    alone = len(given) * max(given)
    assert len(flat) * max(flat) <= alone


def test_sequences_of_one_length_stay_alone_and_others_fill_up():
    lengths = np.array([44] * 16 + [256])
    assert [[len(row) for row in rows] for rows in pack(np.arange(16), lengths, 10_000)] == [[1] * 16]
    lengths = np.array([256, *range(40, 72)])
    ((first, *others),) = list(pack(np.arange(33), lengths, 10_000))
    assert first.tolist() == [0]
    assert len(others) == 8  # four of 40 to 71 in each


def test_rows_hold_sequences_one_behind_the_other(chat_bases: Bases, chats: Path, tmp_path: Path):
    ready = prepared(chat_bases(), chats, tmp_path)
    tokens = in_memory([[Encoded([5, 6, 7], [6, 7, IGNORED])], [Encoded([8], [9])], [Encoded([3, 4], [4, IGNORED])]])
    batch = collate_packed(tokens, [np.array([2, 1]), np.array([0]), np.array([1])], ready.adapted)
    pad = ready.adapted.tokenizer.pad_token_id
    assert batch.ids.tolist() == [[3, 4, 8], [5, 6, 7], [8, pad, pad]]
    assert batch.targets.tolist() == [[4, IGNORED, 9], [6, 7, IGNORED], [9, IGNORED, IGNORED]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 1, 1], [1, 0, 0]]
    assert batch.places is not None
    assert batch.places.tolist() == [[0, 1, 0], [0, 1, 2], [0, 0, 0]]
    assert [row[: sum(mask)] for row, mask in zip(batch.rows.tolist(), batch.mask.tolist(), strict=True)] == [
        [2, 2, 1],
        [0, 0, 0],
        [1],
    ]


def prepared(base: Path, chats: Path, work: Path, *overrides: str, **plan: Any) -> Prepared:
    ready = prepare(tiny_chat.recipe(base, chats, "task.template=plain", *overrides), work, **plan)
    torch.manual_seed(4)
    for name, parameter in ready.adapted.trained().items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    return ready


def step(ready: Prepared) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of a step of all rows."""
    tokens = ready.tokens["train"]
    positions = tokens.of_rows(next(steps(tokens, 100, 7)))
    loss, _ = Attempt(ready.start(), tokens, positions, ready.plan, ready.machine, 0.0).gradient()
    return loss, {name: p.grad.clone() for name, p in ready.adapted.trained().items() if p.grad is not None}


def require_same(found: tuple[float, dict[str, Tensor]], wanted: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def both(base: Path, chats: Path, work: Path, *overrides: str, **plan: Any) -> list[Prepared]:
    """Unpacked and packed."""
    found = [prepared(base, chats, work / str(on), *overrides, packing=on, **plan) for on in (False, True)]
    assert [ready.plan.packing for ready in found] == [False, True]
    return found


@pytest.mark.parametrize("most", [100, 2048])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", PACKED)
def test_packed_and_unpacked_gradients_agree(
    architecture: str, attention: str, most: int, chat_bases: Bases, chats: Path, tmp_path: Path
):
    if (architecture, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has none")
    changes = {"sliding_window": 8} if architecture.startswith("gemma") and architecture != "gemma" else {}
    base = chat_bases(architecture, **changes)
    overrides = ("method.dropout=0.3", "method.kind=lora")
    unpacked, packed = both(base, chats, tmp_path, *overrides, attention=attention, micro_batch_tokens=most)
    rows = list(pack(np.arange(len(packed.tokens["train"])), packed.tokens["train"].lengths, most))
    assert max(len(row) for part in rows for row in part) > 1
    require_same(step(packed), step(unpacked))


@pytest.mark.parametrize("method", ["dora", "ia3", "full"])
def test_packed_and_unpacked_gradients_agree_for_each_method(
    method: str, chat_bases: Bases, chats: Path, tmp_path: Path
):
    dropout = ("method.dropout=0.3",) if method == "dora" else ()
    unpacked, packed = both(chat_bases(), chats, tmp_path, f"method.kind={method}", *dropout)
    require_same(step(packed), step(unpacked))


def test_sequences_of_one_token_and_of_a_whole_row_agree(chat_bases: Bases, chats: Path, tmp_path: Path):
    unpacked, packed = both(chat_bases(), chats, tmp_path, "method.dropout=0.3")
    lengths = [1, 20, 1, 1, 7, 13, 1, 19]
    rows = [[Encoded([40 + (3 * n + at) % 50 for at in range(n)], [41 + at % 50 for at in range(n)])] for n in lengths]
    for ready in (unpacked, packed):
        ready.tokens["train"] = in_memory(rows)
    assert [[len(row) for row in part] for part in pack(np.arange(8), np.array(lengths), 1000)] == [[1, 1, 1, 5]]
    require_same(step(packed), step(unpacked))


def test_a_packed_run_goes_the_same_way(chat_bases: Bases, chats: Path, tmp_path: Path):
    losses = []
    for ready in both(chat_bases(), chats, tmp_path, "method.dropout=0.1", "train.steps=4", "train.batch_size=8"):
        running = train(ready.start(), ready.tokens["train"], ready.plan, ready.machine)
        losses.append([(step.loss, step.gradient_norm, step.tokens) for step in islice(running, 4)])
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


@pytest.mark.parametrize("architecture", SEEN)
def test_a_base_that_would_mix_packed_sequences_has_a_row_for_each(
    architecture: str, chat_bases: Bases, chats: Path, tmp_path: Path
):
    ready = prepared(chat_bases(architecture), chats, tmp_path)
    plan, notes = behaviour.revise(ready.adapted, ready.plan.model_copy(update={"packing": True}))
    assert not plan.packing
    assert notes == ("sequences that share a row would see each other here, so each has a row of its own",)


def test_encoders_are_not_packed(bases: Bases, reviews: Path, tmp_path: Path):
    assert not prepare(recipe(bases(), reviews), tmp_path, packing=True).plan.packing
