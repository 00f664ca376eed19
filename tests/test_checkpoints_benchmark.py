"""The benchmark of checkpoints: what it makes of given figures, and a tiny run that it watches."""

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import checkpoints
from benchmarks.checkpoints import Mark, Save, Watch
from tests.conftest import recipe

EVERY = 16


def marks(save: float, evaluated: int | None = None) -> list[Mark]:
    """Steps of a second for each of some tokens; each sixteenth takes longer, by what a save takes."""
    found, seconds = [], 0.0
    for step in range(6 * EVERY + 1):
        tokens = 1 + step % 3
        seconds += tokens + save * (step % EVERY == 1)
        found.append(Mark(seconds, 2 * seconds, tokens, int(evaluated is not None and step >= evaluated)))
    return found


def test_by_turns_what_a_save_takes_is_found_whatever_the_tokens_of_its_steps():
    found = checkpoints.by_turns(Watch(1.0, marks(0.25)))
    assert found["saves"] == 5
    assert found["seconds"]["mean"] == pytest.approx(0.25)
    assert found["processor"]["median"] == pytest.approx(0.5)
    assert found["seconds"]["error_of_mean"] == pytest.approx(0.0, abs=1e-9)


def test_turns_around_an_evaluation_are_left_out():
    assert checkpoints.by_turns(Watch(1.0, marks(0.25, evaluated=40)))["saves"] == 4


def test_by_default_all_that_is_saved_counts():
    saves = [Save(10, True, 0.5, 0.25, 1.5, 1.0), Save(10, False, 2.0, 1.0)]
    watch = Watch(1.0, [Mark(0.0, 0.0, 0, 0), Mark(90.0, 150.0, 5, 0)], saves, ended=100.0)
    found = checkpoints.by_default(watch)
    assert found["share_stopped"] == pytest.approx(0.025)
    assert found["share_stopped_or_writing"] == pytest.approx(0.04)
    assert found["share_of_processor"] == pytest.approx(2.25 / 150)


def test_a_run_is_watched_until_its_time_is_over(bases: Callable[..., Path], reviews: Path, tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(recipe(bases(), reviews, "train.steps=100000", "train.evaluate_every=1000").to_yaml())
    watch = checkpoints.watched((str(path),), 1.0, 2)
    assert 4 < len(watch.marks) < 100_000
    assert [save.beside for save in watch.saves[:2]] == [True, True]
    assert len(watch.saves) >= (len(watch.marks) - 1) // 2
    assert all(save.bytes > 0 and save.stopped_seconds > 0 for save in watch.saves)
    assert 0 < checkpoints.by_default(watch)["share_stopped"] < 1
