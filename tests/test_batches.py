"""Tokens on disk and in memory: what a task gives as targets comes back, classes and floats alike."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lowres_ft.batches import Tokens, collate, in_memory, tokenize
from lowres_ft.tasks.base import IGNORED, Encoded, Task

CLASSES = [[Encoded([5, 6], [1, IGNORED])], [], [Encoded([7], [0]), Encoded([8, 9, 9], [IGNORED, 2, 3])]]
FLOATS = [
    [Encoded([5, 6], [0.5, float("nan")])],
    [],
    [Encoded([7], [-100.0]), Encoded([8, 9, 9], [2.5, float("nan"), 3])],
]


class Given:
    """Rows, and a model whose task encodes them as told."""

    def __init__(self, encoded: Sequence[list[Encoded]]) -> None:
        self.encoded = encoded
        self.task = SimpleNamespace(encode=lambda _, rows: [encoded[row.number] for row in rows])
        self.tokenizer = SimpleNamespace(pad_token_id=0)
        self.device = "cpu"

    def examples(self, _: Any) -> Any:
        return (SimpleNamespace(number=number, where=f"rows.csv:{number}") for number in range(len(self.encoded)))

    def take(self, _: Any) -> None:
        return None


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize(
    ("encoded", "kind", "truth", "second"),
    [
        (CLASSES, torch.int64, [[1], [0, 2, 3]], [[0, IGNORED, IGNORED], [IGNORED, 2, 3]]),
        (FLOATS, torch.float32, [[0.5], [-100.0, 2.5, 3.0]], [[-100.0, np.nan, np.nan], [2.5, np.nan, 3.0]]),
    ],
)
def test_targets_come_back(
    tmp_path: Path, on_disk: bool, encoded: list[list[Encoded]], kind: torch.dtype, truth: list[Any], second: list[Any]
):
    given = Given(encoded)
    tokens: Tokens = tokenize(given, given, tmp_path / "rows") if on_disk else in_memory([encoded[0], encoded[2]])
    assert [row.tolist() for row in tokens.truth] == truth
    batch = collate(tokens, np.array([1, 2]), given)
    assert batch.targets.dtype == kind
    np.testing.assert_array_equal(batch.targets.numpy(), second)
    assert batch.ids.tolist() == [[7, 0, 0], [8, 9, 9]]
    assert Task(kind="none").counted(tokens.targets) == 4


def test_a_float_among_classes_is_refused_not_cut_off(tmp_path: Path):
    given = Given([[Encoded([5], [1])], [Encoded([5], [1.5])]])
    with pytest.raises(TypeError, match="float"):
        tokenize(given, given, tmp_path / "rows")
    with pytest.raises(TypeError, match="float"):
        in_memory(given.encoded)
