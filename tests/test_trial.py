"""The measurement before the first step: what it tells, and that nothing of it stays."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lowres_ft import attempt, device, expectation, memory, pace, profiles, train, trial
from lowres_ft import course as courses
from lowres_ft.course import Clock, Course
from lowres_ft.errors import ModelError
from lowres_ft.expectation import Expected
from lowres_ft.pace import UNKNOWN, Pace
from lowres_ft.pipeline import run
from lowres_ft.preparing import rehearse
from lowres_ft.train import Step
from tests.conftest import Prepared, prepare, recipe

Bases = Callable[..., Path]

FLAT = Pace(start=0.0, token=0.001, pair=0.0, link=0.0, update=0.5, evaluation=0.25)


def expected(ready: Prepared, told: Pace | None = FLAT) -> Expected:
    return Expected(Course.of(ready.recipe, ready.plan, ready.tokens), pace=told)


def subject(ready: Prepared) -> tuple:
    return ready.recipe, ready.adapted, ready.tokens, ready.plan, ready.machine


def tensors(ready: Prepared) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in ready.adapted.model.state_dict().items()}


def test_nothing_of_a_trial_stays(bases: Bases, reviews: Path, tmp_path: Path):
    ready = prepare(recipe(bases(), reviews, "method.dropout=0.2"), tmp_path)
    before, drawn = tensors(ready), torch.random.get_rng_state()
    trial.run(*subject(ready), expected(ready))
    after = tensors(ready)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in ready.adapted.trained().values())
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert not ready.adapted.room.told


@pytest.mark.parametrize("change", ["model.dtype=float32", "model.dropout=0.1", "model.quantize=int8"])
def test_a_run_ends_with_the_same_bytes_with_and_without(bases: Bases, reviews: Path, tmp_path: Path, change: str):
    adapters = []
    for probe in ("true", "false"):
        wanted = recipe(bases(), reviews, "train.steps=4", change, f"budget.probe={probe}")
        bundle = run(wanted, tmp_path / probe, device_name="cpu")
        adapters.append((bundle.folder / "adapter_model.safetensors").read_bytes())
        report = json.loads((bundle.folder / "report.json").read_bytes())
        assert report["plan"]["memory_bytes"] > 0
        assert report["plan"]["seconds"] > 0
        assert (report["plan"]["probe"] is not None) == (probe == "true")
    assert adapters[0] == adapters[1]


def test_the_longest_texts_are_tried(bases: Bases, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ready = prepare(recipe(bases(), reviews), tmp_path, micro_batch_tokens=40)
    seen: list[np.ndarray] = []
    taken = train.rehearse

    def rehearse_(state: train.TrainState, tokens: object, positions: np.ndarray, *rest: object) -> float:
        seen.append(positions)
        return taken(state, tokens, positions, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "rehearse", rehearse_)
    trial.run(*subject(ready), expected(ready))
    lengths = ready.tokens["train"].lengths
    assert lengths[seen[0]].min() >= np.sort(lengths)[-len(seen[0])]
    assert len(list(attempt.cut(seen[0], lengths, 40))) == 2


def test_memory_that_runs_out_in_a_trial_makes_the_cut_finer(
    bases: Bases, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ready = prepare(recipe(bases(), reviews), tmp_path)
    taken = attempt._backward

    def narrow(state: train.TrainState, batch: attempt.Batch, scale: float) -> float:
        if batch.ids.numel() > 64:
            raise torch.OutOfMemoryError("no more")
        return taken(state, batch, scale)

    monkeypatch.setattr(attempt, "_backward", narrow)
    found = trial.run(*subject(ready), expected(ready))
    assert ready.adapted.room.training is not None
    assert ready.adapted.room.training <= 64
    assert len(ready.adapted.room.told) == 1
    assert found.memory_bytes > 0


@pytest.mark.parametrize(
    ("before", "after", "later", "peak"),
    [
        (300, 640, 40, 686),  # between what was told and what was measured with what is still to come
        (300, 500, 40, 556),  # far from what was told
        (300, 900, 40, 912),
        (300, 500, None, 700),  # a heap of which it is not known how it grows: no less than was told
        (300, 900, None, 900),
        (650, 650, 40, 690),  # loading took more than the probe
        (900, 900, 40, 900),
        (650, 650, None, 660),
    ],
)
def test_the_peak_is_between_what_was_told_and_what_was_measured_with_what_is_still_to_come(before, after, later, peak):
    terms = dict.fromkeys(memory.Memory.__dataclass_fields__, 0)
    told = memory.Memory(**terms | {"activations": 690, "best": 10, "later": later})
    assert trial._peak(before, after, told) == peak


def test_a_short_run_is_not_timed_to_choose_a_cut(bases: Bases, reviews: Path, tmp_path: Path):
    ready = prepare(recipe(bases(), reviews), tmp_path)
    assert trial.choose(*subject(ready), expected(ready)) == ready.plan


@pytest.mark.parametrize(("finer", "chosen"), [(0.5, 256), (0.95, 512)])
def test_a_finer_cut_is_taken_where_it_is_clearly_faster(
    bases: Bases, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finer: float, chosen: int
):
    monkeypatch.setenv("LOWRES_FT_CACHE", str(tmp_path / "cache"))
    ready = prepare(recipe(bases(), reviews, "train.steps=100000"), tmp_path / "work", micro_batch_tokens=512)
    monkeypatch.setattr(trial, "shapes", lambda tokens, step, most: ((1, 1),) * (512 // most))
    monkeypatch.setattr(trial._Subject, "step", lambda self, step, plan: finer ** (512 // plan.micro_batch_tokens - 1))
    assert trial.choose(*subject(ready), expected(ready)).micro_batch_tokens == chosen
    monkeypatch.setattr(trial._Subject, "step", lambda self, step, plan: 1.0)
    assert trial.choose(*subject(ready), expected(ready)).micro_batch_tokens == chosen  # it was kept


def test_several_processes_rehearse_by_themselves_and_take_the_first_one_s_cut(
    bases: Bases, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ready = prepare(recipe(bases(), reviews), tmp_path, micro_batch_tokens=512)
    third = dataclasses.replace(ready.machine, processes=3, rank=2)

    def exchanged(*_: object) -> None:
        raise AssertionError("a process that rehearses more often than others waits for them for ever")

    monkeypatch.setattr(attempt, "sum_over_processes", exchanged)
    for count in (7, 1):  # of one sequence the third process has no share
        assert train.rehearse(ready.start(), ready.tokens["train"], np.arange(count), ready.plan, third) > 0
    monkeypatch.setattr(
        device, "same_for_all", lambda machine, text: {"512": "128"}[text] if machine == third else text
    )
    tried = trial.choose(ready.recipe, ready.adapted, ready.tokens, ready.plan, third, expected(ready))
    assert tried.micro_batch_tokens == 128


def test_the_course_has_the_micro_batches_of_the_run(bases: Bases, reviews: Path, tmp_path: Path):
    ready = prepare(recipe(bases(), reviews, "train.batch_size=7", "train.epochs=2"), tmp_path, micro_batch_tokens=40)
    found = Course.of(ready.recipe, ready.plan, ready.tokens)
    seen: list[tuple[int, int]] = []
    state = ready.start()
    for rows in itertools.islice(courses.batches.steps(ready.tokens["train"], 7, ready.recipe.train.seed), found.steps):
        positions = ready.tokens["train"].of_rows(rows)
        for _, batch in attempt.micro_batches(positions, ready.tokens["train"], ready.plan, ready.adapted):
            seen.append(tuple(batch.ids.shape))
    assert found.steps == state.total
    assert [shape for step in found.sample for shape in step] == seen
    assert found.training(FLAT) == pytest.approx(sum(FLAT.seconds(shape) for shape in seen) + found.steps * FLAT.update)
    assert found.width == max(int(tokens.lengths.max()) for tokens in ready.tokens.values())


def test_evaluations_that_are_left(bases: Bases, reviews: Path, tmp_path: Path):
    wanted = recipe(bases(), reviews, "train.steps=7", "train.evaluate_every=3")
    ready = prepare(wanted, tmp_path)
    found = Course.of(ready.recipe, ready.plan, ready.tokens)
    one = sum(FLAT.of_evaluation(shape) for shape in found.evaluation)
    left = [round(found.evaluating(FLAT, done) / one) for done in range(8)]
    assert left == [3, 3, 3, 2, 2, 2, 1, 1]
    doubled = Course.of(
        ready.recipe, ready.plan, ready.tokens, {"train": 900, "validation": 2 * len(ready.tokens["validation"])}
    )
    assert doubled.evaluating(FLAT) == pytest.approx(2 * found.evaluating(FLAT))


def test_time_to_finish_goes_from_what_was_told_to_what_was_measured():
    course = Course(1000, 0, (((10, 10),),), tokens=100.0, evaluation=(), held_out=0.0, width=10)
    told = Pace(start=0.0, token=0.01, pair=0.0, link=0.0, update=0.0, evaluation=1.0)
    clock = Clock(course, told)

    def step(number: int, tokens: int = 100) -> Step:
        return Step(number, 0.0, 0.0, 0.0, 10, tokens, 2.0 * tokens / 100)

    left = [clock.left(step(number)) for number in range(1, 1001)]
    assert 999 < left[0] < 1.2 * 999
    assert left[499] == pytest.approx(1000, rel=0.02)
    assert left[-1] == 0
    assert Clock(course, None).left(step(1, tokens=50)) == pytest.approx(999 * 2.0)  # a short step is no fast one


@pytest.mark.parametrize(("steps", "left"), [(6, [2, 2, 2, 1, 1, 1]), (7, [3, 3, 3, 2, 2, 2, 1])])
def test_the_evaluation_of_a_step_that_was_just_done_is_still_to_come(steps: int, left: list[int]):
    course = Course(steps, 3, (((10, 10),),), tokens=100.0, evaluation=((10, 10),), held_out=1.0, width=10)
    told = Pace(start=0.0, token=0.01, pair=0.0, link=0.0, update=0.0, evaluation=1000.0)
    clock = Clock(course, told)
    found = [clock.left(Step(number, 0.0, 0.0, 0.0, 10, 100, 1.0)) for number in range(1, steps + 1)]
    assert [round(seconds / told.of_evaluation((10, 10))) for seconds in found] == left


def test_a_pace_is_corrected_between_what_was_timed():
    base = Pace(start=1.0, token=0.5, pair=0.25, link=0.0, update=0.0, evaluation=0.5)
    assert base.seconds((2, 4)) == 1.0 + 8 * (0.5 + 0.25 * 4)
    found = base.corrected([([(10, 10)], 2 * base.seconds((10, 10))), ([(2, 10)], 4 * base.seconds((2, 10)))])
    for rows, ratio in ((1, 4.0), (2, 4.0), (6, 3.0), (10, 2.0), (50, 2.0)):
        assert found.seconds((rows, 10)) == pytest.approx(ratio * base.seconds((rows, 10)))
    assert found.corrected([([(10, 10)], base.seconds((10, 10)))]).seconds((3, 10)) == base.seconds((3, 10))
    assert base.model_copy(update={"link": 90.0}).seconds((1, 1)) == 90.0
    assert UNKNOWN.corrected([([(4, 5)], 2.0)]).seconds((8, 5)) == pytest.approx(4.0)


def test_what_is_expected_comes_from_accounts_of_the_longest_and_the_typical(
    bases: Bases, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LOWRES_FT_CACHE", str(tmp_path / "cache"))
    ready = prepare(recipe(bases(), reviews), tmp_path / "work")
    profile = profiles.profile(ready.adapted.base, ready.recipe.task)
    course = Course.of(ready.recipe, ready.plan, ready.tokens)
    given = (ready.recipe, ready.adapted.base, profile, ready.plan, ready.machine, course)
    found = expectation.expect(*given)
    account = (ready.recipe, ready.adapted.base, profile, ready.plan, course.micro_batches)
    told, _ = memory.estimate(*account, goes_on=course.goes_on)
    assert found.memory == told
    assert found.seconds == course.training(found.pace)
    monkeypatch.setattr(memory, "estimate", None)
    assert expectation.expect(*given) == found  # kept, not accounted for again
    longer = dataclasses.replace(course, sample=(((8, 17),),))
    assert "cannot be told" in expectation.expect(*given[:-1], longer).untold


def test_what_cannot_be_trained_as_asked_is_told_before_it_runs(
    bases: Bases, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LOWRES_FT_CACHE", str(tmp_path / "cache"))

    def refuses(*_: object, **__: object) -> None:
        raise ModelError("int8 needs bitsandbytes")

    monkeypatch.setattr(memory, "estimate", refuses)
    with pytest.raises(ModelError, match="int8 needs bitsandbytes"):
        rehearse(recipe(bases(), reviews), device_name="cpu")


def test_a_model_that_cannot_be_accounted_for_is_trained_all_the_same(
    bases: Bases, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LOWRES_FT_CACHE", str(tmp_path / "cache"))

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("data-dependent\nmore")

    monkeypatch.setattr(memory, "estimate", fails)
    report = json.loads(
        (run(recipe(bases(), reviews, "train.steps=2"), tmp_path / "out").folder / "report.json").read_bytes()
    )
    assert report["plan"]["memory_bytes"] is None
    assert report["plan"]["seconds"] is None
    assert report["plan"]["probe"]["seconds"] > 0
    assert any(note.endswith("before it runs: data-dependent") for note in report["notes"])
    assert "data-dependent" in (tmp_path / "out" / "report.html").read_text()


def test_a_dry_run_tells_memory_and_time(bases: Bases, reviews: Path):
    short, long = (rehearse(recipe(bases(), reviews, f"train.steps={steps}")) for steps in (10, 1000))
    assert short.seconds is not None
    assert long.seconds is not None
    assert long.seconds == pytest.approx(100 * short.seconds, rel=0.2)
    assert short.memory_bytes == long.memory_bytes


def test_paces_of_accounts_add_up(bases: Bases, reviews: Path, tmp_path: Path):
    from lowres_ft import simulate, speed

    ready = prepare(recipe(bases(), reviews), tmp_path)
    profile = profiles.profile(ready.adapted.base, ready.recipe.task)
    long, short = (
        simulate.account(ready.recipe, ready.adapted.base, profile, ready.plan, 8, width) for width in (64, 16)
    )
    rates = speed.Rates(flops={"float32": 1e11, "bfloat16": 1e12}, bandwidth=1e10, link=1e9)
    found = pace.told(long, short, ready.plan, rates, trained=1000, share=speed.Share.of("cpu"))
    told = [speed.seconds(one.training, ready.plan.dtype, rates, speed.Share.of("cpu")) for one in (long, short)]
    assert found.seconds((8, 16)) == pytest.approx(told[1])
    assert found.seconds((8, 64)) == pytest.approx(told[0], rel=0.3)


FAR = 1.5**0.5  # what was told counts for no more than half as much again


@pytest.mark.parametrize(
    ("told", "first", "typical", "asked", "found"),
    [
        ((2, 1), 0.6, (0.3, 0.4, 0.2, 0.25), "t t t t l", {"t": 0.25 * FAR, "l": 0.5 * FAR}),
        ((2, 1), 2.4, (0.9, 1.1), "t t", {"t": 1.1**0.5}),  # no other ends within 3 s
        ((2, 2), 2.5, (), "l", {"l": 0.5 * FAR}),
        ((2, 1), 3.3, (), "", {"l": 3.3 / 1.5}),  # told is too short
        ((4, 3), 3.1, (), "", {"l": 3.1}),  # told is too long
    ],
)
def test_steps_are_timed_as_far_as_there_is_time(
    monkeypatch: pytest.MonkeyPatch,
    told: tuple[int, int],
    first: float,
    typical: tuple[float, ...],
    asked: str,
    found: dict[str, float],
):
    """Within three seconds of a short run; what counts is in the middle of what was told and what was measured."""
    now, done = [0.0], []
    taken = {"t": iter(typical), "l": iter([0.5])}

    class Subject:
        typical = staticmethod(lambda: "t")
        shapes = staticmethod(lambda step, _: ((step, 1),))

        def step(self, step: str, _: object) -> float:
            done.append(step)
            now[0] += (seconds := next(taken[step]))
            return seconds

    monkeypatch.setattr(trial.time, "perf_counter", lambda: now[0])
    known = SimpleNamespace(seconds=lambda shape: dict(zip("lt", told, strict=True))[shape[0]])
    expected, plan = SimpleNamespace(pace=known, seconds=20.0), SimpleNamespace(device="cpu", offload="none")
    timed = trial._timed(Subject(), plan, expected, "l", first)  # type: ignore[arg-type]
    assert done == asked.split()
    assert {shapes[0][0]: seconds for shapes, seconds in timed} == pytest.approx(found)


@pytest.mark.parametrize(
    ("device", "offload", "found"), [("cpu", "none", 6.0), ("cuda", "none", 2.0), ("cpu", "layers", 2.0)]
)
def test_a_first_step_bounds_what_was_told_from_below_where_nothing_else_is_waited_for(
    device: str, offload: str, found: float
):
    plan = SimpleNamespace(device=device, offload=offload)
    assert trial._bounded(2.0, 9.0, plan) == found  # type: ignore[arg-type]
    assert trial._bounded(None, 9.0, plan) == 9.0  # type: ignore[arg-type]


def test_of_steps_of_the_same_shapes_the_one_in_the_middle_counts():
    done = []
    subject = SimpleNamespace(
        typical=lambda: "t", shapes=lambda *_: ((8, 32),), step=lambda step, _: done.append(step) or 0.1
    )
    expected = SimpleNamespace(pace=None, seconds=None, course=SimpleNamespace(steps=10))
    assert trial._timed(subject, None, expected, "l", 0.1) == [(((8, 32),), 0.1)]  # type: ignore[arg-type]
    assert set(done) == {"t"}


def test_a_long_run_has_more_time_for_it(monkeypatch: pytest.MonkeyPatch):
    done = []

    class Subject:
        typical = staticmethod(lambda: "typical")
        shapes = staticmethod(lambda step, _: ((step, 1),))

        def step(self, step: str, _: object) -> float:
            done.append(step)
            return 4.0

    monkeypatch.setattr(trial.time, "perf_counter", lambda: 4.0 * len(done))
    for seconds, count in ((500.0, 2), (2000.0, 5)):  # two hundredths: 10 and 40 s
        done.clear()
        expected = SimpleNamespace(pace=SimpleNamespace(seconds=lambda _: 4.0), seconds=seconds)
        trial._timed(Subject(), None, expected, "longest", 5.0)  # type: ignore[arg-type]
        assert len(done) == count
