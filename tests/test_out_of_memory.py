"""Memory that runs out: the same step again in smaller micro-batches, and the result of a run that had enough."""

import io
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowres_ft import attempt, data, evaluate, fitting, model, packing, shortage
from lowres_ft.batches import Tokens, collate
from lowres_ft.contrast import Contrast
from lowres_ft.errors import OutOfMemoryError
from lowres_ft.fitting import Ready
from lowres_ft.model import Adapted
from lowres_ft.pipeline import run
from lowres_ft.recipe import Recipe
from lowres_ft.shortage import Room
from lowres_ft.tasks.base import Batch
from tests import conftest, tiny_chat
from tests.shortages import CHANGES, KINDS, Disturbed, Failing, adapter


class Small:
    """A memory in which no batch of more than so many padded tokens fits."""

    def __init__(self, tokens: int, patch: pytest.MonkeyPatch) -> None:
        self.tokens, self.largest = tokens, 0
        for module in (evaluate, packing):
            patch.setattr(module, "collate", self.collate)

    def collate(self, tokens: Tokens, positions: np.ndarray, adapted: Adapted) -> Batch:
        batch = collate(tokens, positions, adapted)
        if batch.ids.numel() > self.tokens:
            raise KINDS[0]()
        self.largest = max(self.largest, batch.ids.numel())
        return batch


class Fitted:
    """A loaded recipe that is trained again and again from its first tensors."""

    def __init__(self, wanted: Recipe, work: Path) -> None:
        found = conftest.prepare(wanted, work)
        (work / "rows").mkdir()
        rows = data.load(wanted, work / "rows")
        self.ready = Ready(found.recipe, rows, found.adapted, found.tokens, found.plan, ())
        self.first = {name: tensor.clone() for name, tensor in found.adapted.tensors().items()}
        self.machine = found.machine

    def fit(self) -> tuple[list[float], dict[str, torch.Tensor]]:
        """The loss of each step, and the tensors that are kept."""
        adapted = replace(self.ready.adapted, room=Room())
        adapted.restore(self.first)
        log = io.StringIO()
        fitting.fit(replace(self.ready, adapted=adapted), self.machine, log)
        steps = [json.loads(line) for line in log.getvalue().splitlines()]
        losses = [step["loss"] for step in steps if "loss" in step]
        return losses, {name: tensor.clone() for name, tensor in adapted.tensors().items()}


@pytest.fixture(scope="module")
def wanted(bases: Callable[..., Path], reviews: Path) -> Recipe:
    return conftest.recipe(bases("bert"), reviews, *CHANGES)


@pytest.fixture(scope="module")
def undisturbed(wanted: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The adapter of a run that had all the memory that it asked for."""
    return adapter(run(wanted, tmp_path_factory.mktemp("whole") / "bundle", device_name="cpu").folder)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda told, n=name: f"{n}: {told}")


def test_fifty_errors_at_random_places_leave_losses_and_adapter(wanted, tmp_path):
    """Forward, backward, the optimizer and evaluations: one to three errors in a run of some thousand operations."""
    fitted, chance = Fitted(wanted, tmp_path / "work"), random.Random(7)
    with Failing(set(), MemoryError) as counting:
        losses, expected = fitted.fit()
    for number in range(50):
        at = {chance.randrange(1, counting.done) for _ in range(1 + number % 3)}
        with Failing(at, KINDS[number % len(KINDS)]) as failing:
            found, tensors = fitted.fit()
        assert failing.raised
        assert found == pytest.approx(losses, rel=1e-5)
        assert_same(tensors, expected)


def test_one_error_in_any_part_of_a_run_leaves_the_result(wanted, tmp_path):
    """Loading, scoring and the look at what was written, too; `python -m tests.shortages` does 50."""
    disturbed, chance = Disturbed(wanted, tmp_path), random.Random(7)
    assert {"loading", "trying", "training", "scoring", "comparing"} <= disturbed.parts.keys()
    for number, (part, operations) in enumerate(disturbed.parts.items()):
        came = disturbed.outcome(str(number), {chance.choice(operations)}, KINDS[number % len(KINDS)])
        assert came == "the same", f"{part}: {came}"


def test_a_step_is_done_again_in_smaller_micro_batches_and_that_is_told_once(
    wanted, undisturbed, tmp_path, monkeypatch
):
    heard: list[str] = []
    memory = Small(64, monkeypatch)
    found = run(wanted, tmp_path / "b", device_name="cpu", listen=lambda e: heard.append(str(e)))
    assert memory.largest <= 64
    assert_same(adapter(found.folder), undisturbed)
    told = [text for text in heard if "memory ran out" in text]
    assert len([text for text in told if "in step 1" in text]) == 1
    assert len([text for text in told if "in an evaluation" in text]) == 1
    assert len(told) == 3  # and what stands in the report
    assert "micro-batches had" in (found.folder / "report.json").read_text()


def test_one_text_that_does_not_fit_ends_in_one_error_with_remedies(wanted, tmp_path, monkeypatch):
    Small(3, monkeypatch)
    with pytest.raises(OutOfMemoryError, match=r"step 1, one text at a time, of which \S+ has \d+ tokens") as one:
        run(wanted, tmp_path / "b", device_name="cpu")
    assert "task.max_length=16 saves" in one.value.hint
    assert "model.quantize=int8 saves" in one.value.hint
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("at", [4, 5])  # the first group of the second step, and the second, when that one is done
def test_an_error_in_the_optimizer_leaves_its_state_as_it_was(wanted, undisturbed, tmp_path, monkeypatch, at):
    wanted = wanted.model_copy(update={"budget": wanted.budget.model_copy(update={"probe": False})})
    calls = []

    def failing(self: torch.optim.Optimizer, closure: None = None) -> None:
        calls.append(1)
        if len(calls) == at:  # the first makes the state
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["step"] += 1
            raise MemoryError
        step(self)

    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", failing)
    found = run(wanted, tmp_path / "b", device_name="cpu")
    assert len(calls) == 10  # two groups, four steps
    assert_same(adapter(found.folder), undisturbed)


@pytest.mark.parametrize("where", ["_backward", "_update", "sum_over_processes"])
def test_a_gradient_is_exchanged_once_wherever_memory_runs_out(wanted, tmp_path, monkeypatch, where):
    """As the first of two processes, which has every other sequence of a step."""
    fitted = Fitted(wanted, tmp_path / "work")
    fitted.machine = replace(fitted.machine, processes=2)
    exchanged, calls = [], []
    monkeypatch.setattr(attempt, "sum_over_processes", lambda tensors: exchanged.append(len(tensors)))
    losses, expected = fitted.fit()
    assert len(exchanged) == len(losses) == 4
    real = getattr(attempt, where)

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            if where == "_update":  # in its midst
                arguments[-1].pop().mul_(min(1.0, 1.0 / arguments[2]))
            raise KINDS[0]()
        return real(*arguments)

    monkeypatch.setattr(attempt, where, failing)
    found, tensors = fitted.fit()
    assert len(exchanged) == 8
    assert found == pytest.approx(losses, rel=1e-5)
    assert_same(tensors, expected)


def test_an_update_that_fails_twice_ends_in_one_error_that_says_what_the_library_said(wanted, tmp_path, monkeypatch):
    fitted = Fitted(wanted, tmp_path / "work")

    def failing(*_: Any) -> None:
        raise KINDS[0]()

    monkeypatch.setattr(attempt, "_update", failing)
    with pytest.raises(
        OutOfMemoryError, match=r"step 1, .* stands \(\[enforce fail .* can't allocate memory.*4096 bytes"
    ):
        fitted.fit()


def test_dropout_inside_the_base_keeps_the_cut(wanted, tmp_path, monkeypatch):
    tied = wanted.model_copy(update={"model": wanted.model.model_copy(update={"dropout": 0.1})})
    Small(64, monkeypatch)
    with pytest.raises(OutOfMemoryError, match="dropout inside the base") as error:
        run(tied, tmp_path / "b", device_name="cpu")
    assert error.value.hint == "Use model.dropout=0."


def test_loading_is_tried_twice(wanted, undisturbed, tmp_path, monkeypatch):
    load, calls = model.load, []

    def failing(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise KINDS[0]()
        return load(*arguments, **named)

    monkeypatch.setattr(model, "load", failing)
    assert_same(adapter(run(wanted, tmp_path / "b", device_name="cpu").folder), undisturbed)
    monkeypatch.setattr(model, "load", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(OutOfMemoryError, match="memory ran out: loading"):
        run(wanted, tmp_path / "c", device_name="cpu")


def test_the_untouched_base_is_asked_twice(chat_bases, chats, tmp_path, monkeypatch):
    wanted = tiny_chat.recipe(chat_bases("llama"), chats)
    expected = json.loads((run(wanted, tmp_path / "a", device_name="cpu").folder / "report.json").read_bytes())
    look, calls = Contrast.look, []

    def failing(self: Contrast, *arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise KINDS[0]()
        return look(self, *arguments, **named)

    monkeypatch.setattr(Contrast, "look", failing)
    found = json.loads((run(wanted, tmp_path / "b", device_name="cpu").folder / "report.json").read_bytes())
    assert len(calls) == 3  # again before training, and after it
    assert [found[part] for part in ("samples", "baselines")] == [expected[part] for part in ("samples", "baselines")]
    monkeypatch.setattr(Contrast, "look", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(OutOfMemoryError, match="memory ran out: asking the untouched base"):
        run(wanted, tmp_path / "c", device_name="cpu")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes do not match"),
        RuntimeError("could not create a primitive descriptor for the matmul primitive"),
        RuntimeError("NCCL: Call to ibv_reg_mr failed with error Cannot allocate memory"),
        *(ValueError("out of memory"), KeyError("memory")),
    ],
)
def test_other_errors_are_not_taken_for_it(error):
    assert not shortage.ran_out(error)


def unmapped_file() -> RuntimeError:
    return RuntimeError("unable to mmap 90868376 bytes from file </model.safetensors>: Cannot allocate memory (12)")


@pytest.mark.parametrize("kind", [*KINDS, unmapped_file, lambda: RuntimeError("could not create a primitive")])
def test_what_libraries_say_is_known_and_kept(kind):
    error = kind()
    assert shortage.ran_out(error)
    with pytest.raises(OutOfMemoryError) as caught, shortage.named("loading"):
        raise RuntimeError("a layer") from error
    assert str(caught.value) == (f"memory ran out: loading ({error})" if str(error) else "memory ran out: loading")
