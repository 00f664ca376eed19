"""The loop: the same gradient for any cut, the same bytes from the same state, and errors that name rows."""

import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowres_ft import model, optimizers
from lowres_ft.attempt import Attempt
from lowres_ft.batches import collate, cut, steps, steps_per_epoch
from lowres_ft.errors import TrainingError
from lowres_ft.parts import EarlyStopping, TrainSpec
from lowres_ft.pipeline import run
from lowres_ft.preparing import rehearse
from lowres_ft.train import TrainState, learning_rate, train
from tests.conftest import Prepared, prepare, recipe

Bases = Callable[..., Path]


def gradients(prepared: Prepared, micro_batch_tokens: int) -> dict[str, Tensor]:
    """The first step's gradient under a cut, left in place by a rate of nearly zero and no clipping."""
    state = prepared.start()
    plan = prepared.plan.model_copy(update={"micro_batch_tokens": micro_batch_tokens})
    positions = next(steps(prepared.tokens["train"], 32, 7))
    Attempt(state, prepared.tokens["train"], positions, plan, prepared.machine, 0.0).gradient()
    return {name: p.grad.clone() for name, p in prepared.adapted.trained().items() if p.grad is not None}


def randomize(prepared: Prepared) -> None:
    """Give B values, so that A and dropout have a gradient too."""
    torch.manual_seed(4)
    for name, parameter in prepared.adapted.trained().items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("architecture", ["bert", "deberta-v2", "qwen3"])
def test_every_cut_gives_the_same_gradient(
    bases: Bases, reviews: Path, tmp_path: Path, architecture: str, quantize: str
):
    wanted = recipe(
        bases(architecture), reviews, f"model.quantize={quantize}", "method.dropout=0.1", "train.batch_size=32"
    )
    prepared = prepare(wanted, tmp_path)
    randomize(prepared)
    lengths = prepared.tokens["train"].lengths
    assert len(set(lengths)) > 3  # of unequal lengths
    whole = gradients(prepared, 10_000)
    for tokens in (8 * int(lengths.max()), 40, 1):
        parts = gradients(prepared, tokens)
        assert whole.keys() == parts.keys()
        gaps = torch.stack([(gradient - parts[name]).norm() for name, gradient in whole.items()])
        norms = torch.stack([gradient.norm() for gradient in whole.values()])
        assert gaps.norm() < 1e-5 * norms.norm()
        # A balanced batch's bias gradient is what is left of terms thousands of times as large.
        assert bool((gaps < 1e-5 * torch.maximum(norms, 0.1 * norms.max())).all())


def test_dropout_has_an_effect(bases: Bases, reviews: Path, tmp_path: Path):
    found = []
    for share in ("0.0", "0.1"):
        prepared = prepare(recipe(bases(), reviews, f"method.dropout={share}"), tmp_path / share)
        randomize(prepared)
        found.append(gradients(prepared, 10_000))
    name = next(name for name in found[0] if name.endswith("lora_A"))
    assert not torch.allclose(found[0][name], found[1][name], rtol=1e-2)


def test_the_loss_is_the_mean_over_the_steps_items(bases: Bases, reviews: Path, tmp_path: Path):
    prepared = prepare(recipe(bases(), reviews, "train.batch_size=7"), tmp_path, micro_batch_tokens=40)
    state = prepared.start()
    first = next(train(state, prepared.tokens["train"], prepared.plan, prepared.machine))
    prepared = prepare(recipe(bases(), reviews), tmp_path / "again")
    positions = next(steps(prepared.tokens["train"], 7, 7))
    batch = collate(prepared.tokens["train"], positions, prepared.adapted)
    logits = prepared.adapted.model(input_ids=batch.ids, attention_mask=batch.mask).logits
    expected = torch.nn.functional.cross_entropy(logits, batch.targets[:, 0])
    assert first.loss == pytest.approx(expected.item(), rel=1e-5)
    assert first.examples == 7
    assert first.tokens == int(batch.mask.sum())


def finish(prepared: Prepared, state: TrainState, most: int = 1000) -> dict[str, Tensor]:
    for _ in islice(train(state, prepared.tokens["train"], prepared.plan, prepared.machine), most):
        pass
    return {name: tensor.clone() for name, tensor in prepared.adapted.tensors().items()}


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "head", "full"])
@pytest.mark.parametrize("stop", [3, 7])
def test_a_run_begun_again_from_its_state_goes_on_to_the_same_bytes(
    bases: Bases, reviews: Path, tmp_path: Path, stop: int, method: str
):
    changes = [f"method.kind={method}", "train.steps=10", "train.learning_rate=0.001"]
    changes += ["method.dropout=0.2"] if method in ("lora", "dora") else []
    prepared = prepare(recipe(bases(), reviews, *changes), tmp_path)
    state = prepared.start()
    begin = state.state_dict()
    straight = finish(prepared, state)
    state = prepared.start()
    state.load_state_dict(begin)
    finish(prepared, state, stop)
    held = state.state_dict()
    finish(prepared, state)  # goes on, and must not change what was held
    state = prepared.start()
    state.load_state_dict(held)
    assert state.step == stop
    resumed = finish(prepared, state)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    begun = begin["tensors"]
    assert any(not torch.equal(straight[name], begun[name]) for name in straight)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_8_bit_optimizer_learns_and_goes_on_to_the_same_bytes(
    bases: Bases, reviews: Path, tmp_path: Path, method: str
):
    wide = bases("bert", hidden_size=64, intermediate_size=128)
    changes = [f"method.kind={method}", "train.steps=8", "train.learning_rate=0.003", "train.weight_decay=0.1"]
    changes += ["method.rank=64", "method.dropout=0.2"] if method == "lora" else []
    wanted = recipe(wide, reviews, *changes, "train.optimizer=adamw8bit")
    prepared = prepare(wanted, tmp_path)
    state = prepared.start()
    begin = state.state_dict()
    losses = [step.loss for step in train(state, prepared.tokens["train"], prepared.plan, prepared.machine)]
    assert losses[-1] < losses[0]
    straight = {name: tensor.clone() for name, tensor in prepared.adapted.tensors().items()}
    moments = [one["state1"] for one in state.optimizer.state.values()]
    assert {moment.dtype for moment in moments if moment.numel() >= 4096} == {torch.uint8}
    state = prepared.start()
    state.load_state_dict(begin)
    finish(prepared, state, 5)
    held = state.state_dict()
    finish(prepared, state)  # goes on, and must not change what was held
    state = prepared.start()
    state.load_state_dict(held)
    again = state.state_dict()
    assert flat(again["optimizer"]) == flat(held["optimizer"])
    resumed = finish(prepared, state)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def flat(value: object) -> list[object]:
    """What nested dicts and lists hold, tensors as their bytes."""
    if isinstance(value, Tensor):
        return [value.dtype, tuple(value.shape), value.numpy().tobytes()]
    inner = value.values() if isinstance(value, dict) else value
    return [part for one in inner for part in flat(one)] if isinstance(value, dict | list) else [value]  # type: ignore


def test_an_optimizer_that_a_device_cannot_run_is_refused_before_anything_is_loaded(
    bases: Bases, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    wanted = recipe(bases(), reviews, "train.optimizer=adamw8bit")
    optimizers.require(wanted.train, "cpu")
    with pytest.raises(TrainingError, match=r"adamw8bit needs bitsandbytes, whose version .* does not have it for mps"):
        optimizers.require(wanted.train, "mps")
    monkeypatch.setattr(optimizers, "_KERNEL", "bitsandbytes::no_such_kernel")
    monkeypatch.setattr(model, "load", lambda *_: pytest.fail("weights are read"))
    for act in (lambda: rehearse(wanted, device_name="cpu"), lambda: run(wanted, tmp_path / "out", device_name="cpu")):
        with pytest.raises(TrainingError, match=r"does not have it for cpu"):
            act()


def test_steps_are_partitions_of_each_epoch_and_follow_from_the_seed(bases: Bases, reviews: Path, tmp_path: Path):
    tokens = prepare(recipe(bases(), reviews), tmp_path).tokens["train"]
    per_epoch = steps_per_epoch(len(tokens), 7)
    taken = [list(positions) for positions in islice(steps(tokens, 7, 1), 2 * per_epoch)]
    for epoch in (taken[:per_epoch], taken[per_epoch:]):
        assert sorted(position for positions in epoch for position in positions) == list(range(len(tokens)))
    assert taken[:per_epoch] != taken[per_epoch:]
    assert taken[:3] == [list(positions) for positions in islice(steps(tokens, 7, 1), 3)]
    assert taken[:3] != [list(positions) for positions in islice(steps(tokens, 7, 2), 3)]


@pytest.mark.parametrize("most", [1, 20, 64, 10_000])
def test_a_cut_covers_a_step_within_its_tokens(bases: Bases, reviews: Path, tmp_path: Path, most: int):
    tokens = prepare(recipe(bases(), reviews), tmp_path).tokens["train"]
    positions = next(steps(tokens, 32, 1))
    parts = list(cut(positions, tokens.lengths, most))
    assert sorted(position for part in parts for position in part) == sorted(positions)
    assert all(len(part) == 1 or len(part) * tokens.lengths[part].max() <= most for part in parts)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.25, 0.5, 0.75, 1.0, 0.5]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 0.5]),
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0]),
    ],
)
def test_learning_rate_rises_over_the_warm_up_and_follows_its_schedule(schedule: str, expected: list[float]):
    spec = TrainSpec.model_validate({"schedule": schedule, "warmup": 0.3, "learning_rate": 1.0})
    total = 10
    found = [learning_rate(spec, step, total) for step in range(total)]
    assert found[:4] == pytest.approx(expected[:4])
    middle = learning_rate(spec, 3 + 7 * 10, 3 + 7 * 20) if schedule == "constant" else learning_rate(spec, 65, 100)
    assert middle == pytest.approx(expected[4])
    assert all(rate > 0 for rate in found)


def test_early_stopping_counts_evaluations_and_the_best_is_kept(bases: Bases, reviews: Path, tmp_path: Path):
    prepared = prepare(recipe(bases(), reviews, "train.steps=20"), tmp_path)
    state = prepared.start()
    state.spec = state.spec.model_copy(update={"early_stopping": EarlyStopping(patience=2)})
    marks = []
    for step, metric in zip(
        train(state, prepared.tokens["train"], prepared.plan, prepared.machine), [0.5, 0.7, 0.7, 0.6, 0.9], strict=False
    ):
        state.record(metric)
        marks.append((step.number, {name: t.clone() for name, t in prepared.adapted.tensors().items()}))
    assert [number for number, _ in marks] == [1, 2, 3, 4]
    assert (state.best_step, state.best_metric) == (2, 0.7)
    state.restore_best()
    assert all(torch.equal(t, marks[1][1][name]) for name, t in prepared.adapted.tensors().items())


def test_a_better_step_takes_the_memory_of_the_best_before_and_leaves_what_was_saved(
    bases: Bases, reviews: Path, tmp_path: Path
):
    prepared = prepare(recipe(bases(), reviews, "train.steps=20"), tmp_path)
    state = prepared.start()
    running = train(state, prepared.tokens["train"], prepared.plan, prepared.machine)
    next(running)
    state.record(0.5)
    assert state.best is not None
    places = {name: tensor.data_ptr() for name, tensor in state.best.items()}
    saved = state.state_dict()["best"]
    first = {name: tensor.clone() for name, tensor in saved.items()}
    next(running)
    state.record(0.7)
    assert {name: tensor.data_ptr() for name, tensor in state.best.items()} == places
    assert all(torch.equal(state.best[name], tensor) for name, tensor in prepared.adapted.tensors().items())
    assert all(torch.equal(saved[name], tensor) for name, tensor in first.items())
    assert not torch.equal(saved["classifier.weight"], state.best["classifier.weight"])


def test_memory_that_runs_out_once_while_the_best_step_is_kept_is_asked_for_again(
    bases: Bases, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prepared = prepare(recipe(bases(), reviews), tmp_path)
    state, calls = prepared.start(), []
    keep = state._keep

    def failing() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        keep()

    monkeypatch.setattr(state, "_keep", failing)
    state.record(0.5)
    assert (len(calls), state.best_metric) == (2, 0.5)
    assert state.best is not None


def test_a_loss_that_is_not_finite_names_step_rate_and_rows(bases: Bases, reviews: Path, tmp_path: Path):
    prepared = prepare(recipe(bases(), reviews, "train.steps=5", "train.schedule=constant", "train.warmup=0"), tmp_path)
    state = prepared.start()
    running = train(state, prepared.tokens["train"], prepared.plan, prepared.machine)
    next(running)
    with torch.no_grad():
        prepared.adapted.trained()["classifier.weight"].fill_(math.nan)
    told = r"step 2: the loss is not finite \(learning rate 0.01; rows .*reviews.csv:\d+"
    with pytest.raises(TrainingError, match=told):
        next(running)


def test_an_fp16_step_that_overflows_is_done_again_at_half_the_scale(bases: Bases, reviews: Path, tmp_path: Path):
    wanted = recipe(bases(), reviews, "model.dtype=float16", "train.steps=3")
    prepared = prepare(wanted, tmp_path)
    state = prepared.start()
    straight = finish(prepared, state)
    assert state.loss_scale == 2.0**14
    prepared = prepare(wanted, tmp_path / "again")
    state = prepared.start()
    state.loss_scale = 2.0**30
    seen = list(train(state, prepared.tokens["train"], prepared.plan, prepared.machine))
    assert len(seen) == 3  # none was skipped
    assert state.loss_scale < 2.0**30
    for name, tensor in prepared.adapted.tensors().items():
        torch.testing.assert_close(tensor, straight[name], rtol=0.05, atol=1e-3)


def test_base_dropout_pins_the_cut_and_still_follows_from_the_seed(bases: Bases, reviews: Path, tmp_path: Path):
    found = []
    for number in range(2):
        torch.rand(number)  # whatever was drawn before
        prepared = prepare(recipe(bases(), reviews, "model.dropout=0.1"), tmp_path / str(number))
        assert prepared.plan.pinned_cut
        found.append(finish(prepared, prepared.start()))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    without = prepare(recipe(bases(), reviews), tmp_path / "without")
    assert not without.plan.pinned_cut
    plain = finish(without, without.start())
    assert any(not torch.equal(plain[name], found[0][name]) for name in plain)
