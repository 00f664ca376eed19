"""Keyed dropout against its definition."""

import pytest
import torch
from torch import Tensor, nn

from lowres_ft.dropout import DropoutKeys
from lowres_ft.errors import ModelError
from lowres_ft.linear import LowRankLinear
from lowres_ft.methods.base import LowRank
from lowres_ft.storage import Plain


def masks(layer: LowRankLinear, step: int, rows: list[int], length: int) -> Tensor:
    """(B, T, inputs): the mask that a layer applies, seen through an adapter that is the identity."""
    layer.keys.set(step, torch.tensor(rows), length)
    seen = layer(torch.ones(len(rows), length, layer.in_features))
    layer.keys.clear()
    return seen


def identity(dropout: float, width: int = 64, name: str = "layer", seed: int = 3) -> LowRankLinear:
    held = Plain(torch.zeros(width, width))
    layer = LowRankLinear(held, None, LowRank(width, 1.0, dropout), name, DropoutKeys(seed))
    for parameter in (layer.lora_A, layer.lora_B):
        nn.init.eye_(parameter)
    return layer


def test_dropout_keeps_the_right_share_and_scales_what_it_keeps():
    seen = masks(identity(0.1), step=1, rows=list(range(200)), length=8)
    kept = (seen != 0).float()
    assert abs(kept.mean().item() - 0.9) < 0.003
    torch.testing.assert_close(seen[seen != 0], torch.full_like(seen[seen != 0], 1 / 0.9))
    # No row, position or feature is favoured: the spread of each one's share is that of independent draws.
    for axes in ((0, 1), (0, 2), (1, 2)):
        share = kept.mean(dim=axes)
        expected = (0.09 / (kept.numel() / share.numel())) ** 0.5
        assert share.std().item() < 1.4 * expected


def test_dropout_depends_on_example_and_position_but_not_on_the_cut_or_the_padding():
    layer = identity(0.5)
    whole = masks(layer, 4, [11, 5, 8], length=6)
    torch.testing.assert_close(whole[1:2, :3], masks(layer, 4, [5], length=3))
    torch.testing.assert_close(whole[[2, 0]], masks(layer, 4, [8, 11], length=6))


@pytest.mark.parametrize("change", ["step", "row", "layer", "seed"])
def test_dropout_changes_with_each_key(change: str):
    other = identity(0.5, name="other" if change == "layer" else "layer", seed=4 if change == "seed" else 3)
    first = masks(identity(0.5), 1, [1], length=4)
    second = masks(other, 2 if change == "step" else 1, [2 if change == "row" else 1], length=4)
    assert 0.35 < (first == second).float().mean().item() < 0.65


def test_an_input_that_all_examples_share_is_keyed_by_the_step_alone():
    layer = identity(0.5)
    seen = []
    for rows in ([1, 2, 3], [7, 8]):
        layer.keys.set(2, torch.tensor(rows), length=5)
        seen.append(layer(torch.ones(1, 9, 64)))
    torch.testing.assert_close(seen[0], seen[1])


def test_an_input_that_cannot_be_keyed_is_refused():
    layer = identity(0.5)
    layer.keys.set(2, torch.tensor([1, 2]), length=5)
    with pytest.raises(ModelError, match=r"shape \(5, 2, 64\) for 2 texts of 5 tokens"):
        layer(torch.ones(5, 2, 64))


def test_texts_that_are_flattened_one_behind_the_other_get_the_same_mask():
    layer = identity(0.5)
    layer.keys.set(2, torch.tensor([1, 2]), length=5)
    torch.testing.assert_close(layer(torch.ones(10, 64)).view(2, 5, 64), layer(torch.ones(2, 5, 64)))


@pytest.mark.parametrize("shape", [(2, 8), (16,)])
def test_a_packed_token_gets_the_mask_that_it_gets_alone(shape: tuple[int, ...]):
    layer = identity(0.5)
    alone = {row: masks(layer, 4, [row], length=5)[0] for row in (11, 5, 8, 2)}
    rows, places = (
        torch.tensor([[11, 11, 11, 5, 5, 5, 5, 5], [8, 8, 8, 8, 2, 2, 2, 0]]),
        torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 0, 1, 2, 0]]),
    )
    layer.keys.set(4, rows, 8, places)
    seen = layer(torch.ones(*shape, 64)).view(2, 8, 64)
    packed = [seen[0, :3], seen[0, 3:], seen[1, :4], seen[1, 4:7]]
    for row, found in zip((11, 5, 8, 2), packed, strict=True):
        torch.testing.assert_close(found, alone[row][: len(found)])


def test_a_summary_of_packed_sequences_cannot_be_keyed():
    layer = identity(0.5)
    layer.keys.set(2, torch.tensor([[1, 1, 2], [3, 3, 3]]), 3, torch.tensor([[0, 1, 0], [0, 1, 2]]))
    with pytest.raises(ModelError, match=r"shape \(2, 64\) for 2 texts of 3 tokens"):
        layer(torch.ones(2, 64))


def test_without_keys_there_is_no_dropout():
    layer = identity(0.5)
    torch.testing.assert_close(layer(torch.ones(2, 64)), torch.ones(2, 64))
