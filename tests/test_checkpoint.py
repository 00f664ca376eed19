"""Checkpoints: what was saved is what comes back, to the bit; what is half written is none."""

import json
import math
import os
import stat
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from lowres_ft import checkpoint, limits, saving
from lowres_ft.checkpoint import Record, contents, load, newest, save
from lowres_ft.errors import RecipeError
from lowres_ft.saving import Keeper
from lowres_ft.train import Step, TrainState, train
from tests.conftest import Prepared, prepare, recipe

Bases = Callable[..., Path]
STEP = Step(1, 0.1 + 0.2, 1e-3, math.nan, 8, 2**40, 1 / 3)


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return one == other and type(one) is type(other)


def begun(wanted: object, work: Path, steps: int = 3) -> tuple[Prepared, TrainState]:
    prepared = prepare(wanted, work)  # type: ignore[arg-type]
    state = prepared.start()
    for _ in islice(train(state, prepared.tokens["train"], prepared.plan, prepared.machine), steps):
        pass
    return prepared, state


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "head", "full"])
@pytest.mark.parametrize("evaluated", [True, False])
def test_what_is_saved_comes_back_to_the_bit(
    bases: Bases, reviews: Path, tmp_path: Path, method: str, optimizer: str, evaluated: bool
):
    changes = (f"method.kind={method}", f"train.optimizer={optimizer}", "train.steps=9")
    prepared, state = begun(recipe(bases(), reviews, *changes), tmp_path / "work")
    record = Record([STEP], [(2, math.nan)] if evaluated else [])
    if evaluated:
        state.record(0.5)
    before = state.state_dict()
    save(contents(state, record, prepared.plan).copied(), tmp_path / "checkpoints")
    found, damaged = newest(tmp_path / "checkpoints")
    assert not damaged
    assert found is not None
    assert (found.step, found.total, found.plan) == (3, 9, prepared.plan)
    other = prepare(prepared.recipe, tmp_path / "other").start()
    assert not equal(other.state_dict(), before)
    again = load(found, other, prepared.plan)
    assert equal(other.state_dict(), before)
    assert repr(again) == repr(record)


def test_the_newest_two_are_kept_and_the_manifest_is_what_counts(bases: Bases, reviews: Path, tmp_path: Path):
    prepared, state = begun(recipe(bases(), reviews, "train.steps=9"), tmp_path / "work", 1)
    for step in (1, 2, 3):
        state.step = step
        save(contents(state, Record(), prepared.plan), tmp_path / "all")
    names = ["00000002-00000", "00000003-00000"]
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == names
    (tmp_path / "all" / names[1] / "manifest.json").unlink()
    found, damaged = newest(tmp_path / "all")
    assert found is not None
    assert (found.folder.name, damaged) == (names[0], [])
    (tmp_path / "all" / names[0] / "state.json").write_text("{}")
    found, damaged = newest(tmp_path / "all")
    assert found is None
    assert "state.json was changed" in damaged[0]
    checkpoint.discard(tmp_path / "all")
    assert list((tmp_path / "all").iterdir()) == []


def test_checkpoints_hold_no_pickle_and_obey_the_umask(bases: Bases, reviews: Path, tmp_path: Path):
    prepared, state = begun(recipe(bases(), reviews), tmp_path / "work", 1)
    before = os.umask(0o027)
    try:
        place = save(contents(state, Record(), prepared.plan), tmp_path / "all")
    finally:
        os.umask(before)
    assert sorted(path.name for path in place.iterdir()) == ["manifest.json", "state.json", "tensors.safetensors"]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()}
    assert (modes, stat.S_IMODE(place.stat().st_mode)) == ({0o640}, 0o750)
    for name in ("manifest.json", "state.json"):
        json.loads((place / name).read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@pytest.mark.parametrize("every", [50, "5m", "90s", "auto", "none", "off"])
def test_rhythms_are_read(bases: Bases, reviews: Path, every: object):
    assert recipe(bases(), reviews, f"train.checkpoint_every={every}").train.checkpoint_every == every


@pytest.mark.parametrize("every", [0, -1, "often", "5", "5 parsecs", 1.5, "true"])
def test_what_is_no_rhythm_is_refused(bases: Bases, reviews: Path, every: object):
    with pytest.raises(RecipeError, match=r"train\.checkpoint_every: must be"):
        recipe(bases(), reviews, f"train.checkpoint_every={every!r}")


@pytest.mark.parametrize(
    ("every", "cost", "after", "due"),
    [
        (5, 0.0, 0.0, True),
        (4, 0.0, 0.0, False),
        ("auto", 0.1, 59.0, False),
        ("auto", 0.1, 61.0, True),
        ("auto", 10.0, 1100.0, False),
        ("auto", 10.0, 1201.0, True),
        ("90s", 10.0, 91.0, True),
        ("none", 0.0, 1e9, False),
    ],
)
def test_when_it_is_time(monkeypatch: pytest.MonkeyPatch, every: int | str, cost: float, after: float, due: bool):
    now = [100.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    keeper = Keeper(Path("nowhere"), every)
    keeper.cost = cost
    now[0] += after
    assert keeper._due(10) is due


@pytest.mark.parametrize(
    ("every", "cost", "after", "saved"),
    [
        ("auto", 0.1, 13.0, True),
        ("auto", 0.1, 11.0, False),
        ("auto", 2.0, 100.0, False),
        (1000, 2.0, 1.0, True),
        ("90s", 2.0, 1.0, True),
        ("none", 0.0, 1e9, False),
    ],
)
def test_the_end_of_training_is_saved_where_that_takes_less_than_its_share(
    monkeypatch: pytest.MonkeyPatch, every: int | str, cost: float, after: float, saved: bool
):
    now, written = [100.0], []
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    keeper = Keeper(Path("nowhere"), every)
    monkeypatch.setattr(keeper, "_save", lambda *_, beside: written.append(beside))
    with keeper.watching(*[None] * 3):  # type: ignore[arg-type]
        keeper.cost = cost
        now[0] += after
    assert written == [False] * saved


def test_under_a_bound_of_memory_none_is_written_beside_training(
    bases: Bases, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prepared, state = begun(recipe(bases(), reviews), tmp_path / "work")
    for held, name in ((True, "held"), (False, "free")):
        monkeypatch.setattr(limits, "held_now", lambda held=held: held)
        keeper = Keeper(tmp_path / name, every=1)
        keeper.keep(state, Record(), prepared.plan)
        assert (keeper.thread is None) == held
        keeper._wait()
        assert newest(tmp_path / name)[0] is not None


@pytest.mark.parametrize(
    ("then", "now", "left"), [(None, None, None), (512, None, 512), (None, 256, 256), (512, 256, 256), (128, 256, 128)]
)
def test_a_run_goes_on_by_the_smaller_of_the_cuts_that_were_found_out(
    bases: Bases, reviews: Path, tmp_path: Path, then: int | None, now: int | None, left: int | None
):
    prepared, state = begun(recipe(bases(), reviews), tmp_path / "work", 1)
    room = prepared.adapted.room
    room.training, room.evaluation = then, now
    save(contents(state, Record(), prepared.plan), tmp_path / "checkpoints")
    room.training, room.evaluation = now, then
    found, _ = newest(tmp_path / "checkpoints")
    assert found is not None
    load(found, state, prepared.plan)
    assert (state.cut, room.training, room.evaluation) == (left, left, left)
