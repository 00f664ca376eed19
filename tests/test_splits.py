"""The split of rows into train, validation and test: properties that hold for any rows, shares and seed."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowres_ft import splits
from lowres_ft.data import Rows
from lowres_ft.errors import DataError
from lowres_ft.splits import Keys
from lowres_ft.tasks.base import Ragged, Task
from lowres_ft.tasks.classification import Classification
from tests.test_data import TEN, rows_of

TASK = Classification(labels=("bad", "good"))
CLASSES = ("bad", "good", "so-so", "great")


def split(rows: Rows, task: Task, shares: Mapping[str, float], seed: int) -> dict[str, np.ndarray]:
    return splits.split(Keys(rows.keys(), rows.labels), task, shares, seed)


def share_of(rows: Rows, part: np.ndarray, label: str) -> int:
    return rows.take(part).labels.count((label,))


@st.composite
def labelled(draw: st.DrawFn, *, repeats: int) -> list[tuple[str, str]]:
    """Rows of 2 to 4 classes with 3 to 20 texts each, every one up to `repeats` times, in any order."""
    pairs = [
        (f"{label} {number}", label)
        for label in CLASSES[: draw(st.integers(2, 4))]
        for number in range(draw(st.integers(3, 20)))
        for _ in range(draw(st.integers(1, repeats)))
    ]
    return draw(st.permutations(pairs))


FOUR = Classification(labels=CLASSES)
SHARES = st.dictionaries(st.sampled_from(["validation", "test"]), st.floats(0.01, 0.3), max_size=2)
LARGE_SHARES = st.dictionaries(st.sampled_from(["validation", "test"]), st.floats(0.01, 0.49), max_size=2)
SEEDS = st.integers(0, 2**31 - 1)
quick = settings(max_examples=60, deadline=None)


@quick
@given(pairs=labelled(repeats=4), shares=LARGE_SHARES, seed=SEEDS)
def test_a_split_is_a_partition_with_every_class_in_every_part(
    pairs: list[tuple[str, str]], shares: dict[str, float], seed: int
):
    rows = rows_of(pairs)
    parts = split(rows, FOUR, shares, seed)
    assert list(parts) == ["train", *shares]
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(pairs)))
    for part in parts.values():
        assert set(rows.take(part).labels) == {(label,) for _, label in pairs}


@quick
@given(pairs=labelled(repeats=4), shares=LARGE_SHARES, seed=SEEDS)
def test_equal_texts_stay_on_one_side(pairs: list[tuple[str, str]], shares: dict[str, float], seed: int):
    rows = rows_of(pairs)
    found = [{pairs[place][0] for place in part} for part in split(rows, FOUR, shares, seed).values()]
    assert sum(map(len, found)) == len({text for text, _ in pairs})


@quick
@given(pairs=labelled(repeats=1), shares=SHARES, seed=SEEDS)
def test_a_split_of_different_texts_is_stratified_to_the_row(
    pairs: list[tuple[str, str]], shares: Mapping[str, float], seed: int
):
    rows = rows_of(pairs)
    parts = split(rows, FOUR, shares, seed)
    for label, count in Counter(label for _, label in pairs).items():
        for name, share in shares.items():
            assert share_of(rows, parts[name], label) == max(1, round(share * count))


@quick
@given(pairs=labelled(repeats=4), shares=SHARES, seed=SEEDS)
def test_a_split_of_repeated_texts_is_stratified_to_the_text(
    pairs: list[tuple[str, str]], shares: Mapping[str, float], seed: int
):
    rows = rows_of(pairs)
    parts = split(rows, FOUR, shares, seed)
    for label, count in Counter(label for _, label in pairs).items():
        for name, share in shares.items():
            assert 1 <= share_of(rows, parts[name], label) <= max(1, round(share * count)) + 3


@quick
@given(pairs=labelled(repeats=2), seed=SEEDS)
def test_a_split_is_the_same_for_the_same_seed(pairs: list[tuple[str, str]], seed: int):
    shares = {"validation": 0.2, "test": 0.1}
    first, second = (split(rows_of(pairs), FOUR, shares, seed) for _ in range(2))
    assert {name: part.tolist() for name, part in first.items()} == {n: part.tolist() for n, part in second.items()}


def test_another_seed_gives_another_split_and_another_order():
    rows = rows_of(TEN)
    first, second = (split(rows, TASK, {"test": 0.25}, seed) for seed in (1, 2))
    assert set(first["test"].tolist()) != set(second["test"].tolist())
    assert first["train"].tolist() != sorted(first["train"].tolist())


def test_a_text_that_fills_half_a_class_does_not_fill_a_small_part():
    rows = rows_of([*TEN, *[("the same again", "good")] * 60])
    for seed in range(10):
        parts = split(rows, TASK, {"validation": 0.1, "test": 0.1}, seed)
        assert share_of(rows, parts["validation"], "good") == share_of(rows, parts["test"], "good") == 8


def test_a_text_with_two_labels_stays_on_one_side_with_the_first():
    rows = rows_of([*TEN, *[("film 0", "good")] * 5])
    same = {0, 40, 41, 42, 43, 44}
    for seed in range(10):
        parts = split(rows, TASK, {"test": 0.3}, seed)
        assert [len(same & set(part.tolist())) for part in parts.values()] in ([6, 0], [0, 6])


def test_a_class_written_both_as_name_and_number_is_split_once():
    rows = rows_of([(f"film {number}", ("0", "bad", "good", "1")[number % 4]) for number in range(80)])
    parts = split(rows, TASK, {"test": 0.1}, seed=3)
    assert Counter(TASK.class_of(label) for [label] in rows.take(parts["test"]).labels) == {0: 4, 1: 4}


def test_rows_without_a_label_are_no_class_that_could_be_too_small():
    class Plain(Task):
        kind: str = "plain"

    keys = Keys(Ragged(np.arange(2, dtype=np.uint64), np.arange(3)), [(), ()])
    with pytest.raises(DataError, match=r"data\.validation gets no row: 2 rows"):
        splits.split(keys, Plain(), {"validation": 0.2, "test": 0.2}, 7)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 30).map(lambda number: 2**64 - 1 - number * 7919), max_size=4), max_size=25))
def test_rows_that_hang_together_share_the_least_hash(rows):
    hashes = [np.array(row, dtype=np.uint64) for row in rows]
    found = Keys(Ragged.of([*hashes, np.array([5], dtype=np.uint64)]), [()] * (len(rows) + 1)).groups()
    together, nothing = closed([{*row} for row in rows]), 2**64 - 1
    assert found.tolist()[:-1] == [min(one, default=nothing) for one in together]
    assert found[-1] == 5


def closed(together: list[set[int]]) -> list[set[int]]:
    """Sets that share an element made one, until none do."""
    changed = True
    while changed:
        changed = False
        for one in together:
            for other in together:
                if one & other and one != other:
                    one |= other
                    other |= one
                    changed = True
    return together


def test_a_long_chain_of_rows_is_one_group():
    numbers = np.random.default_rng(1).permutation(20_000).astype(np.uint64)
    pairs = np.stack([numbers[:-1], numbers[1:]], axis=1)
    found = Keys(Ragged(pairs.reshape(-1), np.arange(len(pairs) + 1) * 2), [()] * len(pairs)).groups()
    assert (found == 0).all()
