"""The benchmarks: what they make of given figures, useful FLOPs by hand, ours on a tiny base. No time is asserted."""

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import flops, limit, prepare, table, works
from benchmarks.job import Clock, Job, Made
from benchmarks.measure import held_out_loss, measure
from benchmarks.works import GOALS, OURS_BF16, OURS_FP32, TEXTBOOK, WORKS, Contender, Goal
from lowres_ft import yaml12
from lowres_ft.recipe import load_recipe, parse
from tests.conftest import recipe

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
PEER = "trainer bf16 even"


def result(contender: str, repeat: int, **figures: float) -> dict:
    """A contender's figures in one repeat, as a process writes them."""
    usual = {"tokens/s": 1000.0, "memory": 2e9, "growth": 1e9, "loss": 0.5, "weights": None, "seconds": 1.0}
    usual |= {"trainable_parameters": 10, "all_tokens": 90}
    return {"contender": contender, "repeat": repeat, **usual, **figures}


def measured(*results: dict) -> dict:
    """What is known of a work with those results: products of 2, 1 and 4 TFLOP/s, a token of 1 GFLOP."""
    limits = [{"repeat": at, "float32": 1e12, "bfloat16": rate} for at, rate in enumerate((2e12, 1e12, 4e12))]
    prepared = {"flops_per_token": 1e9, "rows": 96, "mean_tokens": 27.0}
    return {"steps": 2, "prepared": prepared, "limits": limits, "results": list(results)}


@pytest.fixture
def record() -> dict:
    """Three repeats of ours and a peer, in the second of which the machine is half as fast."""
    rates = ((6000.0, 3000.0, 6600.0), (1000.0, 500.0, 1100.0))
    results = [
        result(name, repeat, **{"tokens/s": rate, "memory": memory, "loss": loss})
        for name, own, memory, loss in (("ours bf16", rates[0], 1e9, 0.50), (PEER, rates[1], 2e9, 0.55))
        for repeat, rate in enumerate(own)
    ]
    return {"works": {"a": measured(*results)}, "failures": []}


def test_ratios_are_taken_in_each_repeat_before_their_median(record):
    ratios = table.ratio(record["works"]["a"], "ours bf16", PEER, "tokens/s")
    assert ratios == pytest.approx({0: 6.0, 1: 6.0, 2: 6.0})
    found = table.spread(table.by_repeat(record["works"]["a"], "ours bf16", "tokens/s"))
    assert found == table.Spread(6000.0, 3000.0, 6600.0)
    assert table.spread({}) is None


def test_a_repeat_that_one_side_lacks_counts_for_neither(record):
    del record["works"]["a"]["results"][0]
    assert set(table.ratio(record["works"]["a"], "ours bf16", PEER, "tokens/s")) == {1, 2}


def test_the_share_is_of_the_same_repeats_product(record):
    assert table.share(record["works"]["a"], OURS_BF16) == pytest.approx({0: 3.0, 1: 3.0, 2: 1.65})


def test_a_goal_is_measured_against_the_peer_that_is_hardest_to_beat():
    results = [result("ours bf16", 0, **{"tokens/s": 1200.0, "memory": 1e9})]
    results += [result("trl bf16 even", 0, **{"tokens/s": 300.0, "memory": 4e9})]
    results += [result("trl bf16 packed even", 0, **{"tokens/s": 200.0, "memory": 2e9})]
    speed, memory = (goal for goal in GOALS if goal.work == "c")
    assert table.reached(speed, measured(*results)) == table.Spread(4.0, 4.0, 4.0)
    assert table.reached(memory, measured(*results)) == table.Spread(0.5, 0.5, 0.5)
    assert speed.met(4.0)
    assert not speed.met(3.9)
    assert not memory.met(0.5)
    assert table.reached(speed, measured()) is None


def test_the_tables_tell_medians_ranges_and_goals(record):
    console = Console(width=200, file=io.StringIO())
    for one in table.tables(record):
        console.print(one)
    text = console.file.getvalue()
    assert re.search(r"ours bf16 +│ 6,000 \[3,000, 6,600\] │ +1\.00 GB │ .* 0\.500 │", text)
    assert re.search(rf"{PEER} +│ +1,000 \[500, 1,100\] .* 6\.00x │ +0\.50x │", text)
    assert re.search(r"tokens/s +│ >= 6\.00x +│ 6\.00x +│ met", text)
    assert re.search(r"peak memory +│ <= 0\.60x +│ 0\.50x +│ met", text)


def test_what_must_agree_and_does_not_is_told(record):
    assert list(table.disagreements(record)) == []
    for one in record["works"]["a"]["results"]:
        if one["contender"] == PEER:
            one |= {"loss": 0.7, "trainable_parameters": 11}
    found = list(table.disagreements(record))
    assert found == [
        f"a, {PEER}: the loss is 0.700, that of ours bf16 0.500; they may differ by 0.1",
        f"a, {PEER}: trainable_parameters are [11], of ours bf16 [10]",
    ]


def test_a_loss_that_is_no_number_agrees_with_none(record):
    record["works"]["a"]["results"][-1]["loss"] = record["works"]["a"]["results"][-2]["loss"] = float("nan")
    assert len(list(table.disagreements(record))) == 1


@pytest.mark.parametrize("name", WORKS)
def test_works_are_consistent(name):
    work = WORKS[name]
    assert work.name == name
    assert load_recipe(work.recipe, work.overrides).train.warmup == 0
    assert OURS_BF16 in work.contenders
    names = [contender.name for contender in work.contenders]
    assert len(set(names)) == len(names)
    assert {contender.family for contender in work.contenders} >= {"ours"}
    quick = works.chosen(name, quick=True)
    assert quick.rows < work.rows
    assert quick.clocked >= 1


def test_goals_name_contenders_of_their_work():
    for goal in GOALS:
        for name in (goal.ours, *goal.peers):
            assert WORKS[goal.work].named(name).even, "goals are checked on even terms"
        for name in goal.as_they_come.peers:
            assert name in ("ours bf16", "trainer bf16", "trainer int8", "trl bf16", "trl bf16 packed")
            assert WORKS[goal.work].named(name)
    assert len(GOALS) == 18


def test_every_family_of_contenders_is_measured_and_has_its_file():
    files = {path.stem for path in (BENCHMARKS / "contenders").glob("*.py")} - {"__init__"}
    assert files == {contender.family for work in WORKS.values() for contender in work.contenders}
    for name in files - {"trl_sft"}:  # which needs an extra
        assert callable(import_module(f"benchmarks.contenders.{name}").run)


def test_repeats_begin_at_different_contenders_and_leave_none_out():
    session = command.Session(3, "cpu", quick=False, only=())
    orders = [session.order(WORKS["a"], repeat) for repeat in range(3)]
    assert len({order[0] for order in orders}) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1
    assert len(orders[0]) == len(WORKS["a"].contenders) + 1
    assert command.Session(1, "cpu", quick=True, only=("ours bf16",)).order(WORKS["a"], 0) == ["ours bf16", "limit"]


def test_the_command_shows_a_record_and_exits_1_where_losses_disagree(record, tmp_path):
    app = typer.Typer()
    app.command()(command.main)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    shown = CliRunner().invoke(app, ["--show", str(path)])
    assert shown.exit_code == 0
    assert "Goals" in shown.output
    record["works"]["a"]["results"][0]["loss"] = record["works"]["a"]["results"][1]["loss"] = 3.0
    record["failures"] = [{"work": "a", "contender": "trl bf16", "repeat": 0, "error": "Trace\nImportError: no trl"}]
    path.write_text(json.dumps(record))
    shown = CliRunner().invoke(app, ["--show", str(path)])
    assert shown.exit_code == 1
    assert "error: a, trl bf16: failed: ImportError: no trl" in shown.output
    assert "the loss is 0.550" in shown.output
    assert CliRunner().invoke(app, ["--work", "z"]).exit_code == 2
    assert CliRunner().invoke(app, ["--contender", "z"]).exit_code == 2


def test_the_parent_imports_nothing_heavy():
    code = "import sys, benchmarks.__main__; print({'torch', 'transformers', 'lowres_ft', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_clock_counts_from_the_end_of_the_warm_up():
    clock = Clock(2, "cpu")
    clock.times, clock.tokens = [10.0, 11.0, 13.0, 16.0], [1, 2, 3, 4]
    assert (clock.seconds, clock.timed_tokens) == (5.0, 7)
    clock.step(9)
    assert clock.tokens[-1] == 9
    assert clock.times[-1] > 0


def test_useful_flops_of_an_encoder_are_those_counted_by_hand(bases, reviews):
    """Width 32, inner width 64, two layers, LoRA r4 on all linear layers, a head of 32 x 2 and 2."""
    resolved = recipe(bases(), reviews)
    cost = flops.cost(resolved)
    tokens = 5
    layer = 4 * 32 * 32 + 2 * 32 * 64
    adapters = 4 * (4 * (32 + 32) + 2 * (32 + 64))
    attention = 2 * tokens * tokens * 32
    pooler, own = 32 * 32, 4 * (32 + 32)
    head = 32 * 2 + 2
    forward = 2 * (2 * (tokens * (layer + adapters) + attention) + pooler + own + head)
    assert cost.forward(tokens, 1) == forward
    # Backward the same again for inputs and for adapters, attention twice; nothing below query, key and value of the
    # first layer is trained, so no gradient passes them and the A of their adapters.
    first = 3 * tokens * (32 * 32 + 4 * 32)
    backward = 2 * (2 * (tokens * (layer + 2 * adapters) + 2 * attention) - first + pooler + 2 * own + 2 * head)
    assert cost.backward(tokens, 1) == backward


def test_useful_flops_of_a_decoder_count_what_looks_back_and_is_supervised(chat_bases, chats):
    raw = {
        "name": "tiny",
        "task": {"kind": "chat", "max_length": 64},
        "model": {"base": str(chat_bases())},
        "method": {"kind": "lora", "rank": 4, "targets": "all-linear"},
        "data": {"train": str(chats)},
    }
    cost = flops.cost(parse(raw))
    linear = cost.forward(1, 0) - 2 * 2 * 2 * 32
    assert cost.forward(7, 0) == 7 * linear + 2 * 2 * 2 * 32 * 28
    assert cost.forward(7, 3) - cost.forward(7, 0) == cost.backward(7, 3) - cost.backward(7, 0) == 2 * 3 * cost.head
    assert sum(not layer.above_trained for layer in cost.layers) == 3


def test_products_have_a_rate(monkeypatch):
    monkeypatch.setattr(limit, "_SIZES", {"cpu": (16,)})
    monkeypatch.setattr(limit, "_SECONDS", 0.0)
    assert all(rate > 0 for rate in limit.rates("cpu").values())


@pytest.fixture
def job(bases, reviews, tmp_path, monkeypatch) -> Job:
    """Two steps after one that is not timed, prepared on a tiny base."""
    raw = recipe(bases(), reviews).model_dump(mode="json")
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml12.dumps(raw), encoding="utf-8")
    folder = tmp_path / "work"
    folder.mkdir()
    work = replace(
        WORKS["a"], recipe=str(path), overrides=("train.warmup=0",), batch_size=8, warmup=1, steps=2, held_out=5
    )
    prepare.prepare(work, folder, "cpu")
    return Job(work, OURS_FP32, folder, seed=8, device="cpu")


def test_ours_is_measured_on_the_rows_that_were_prepared(job):
    found = measure(job)
    assert found["all_tokens"] == job.prepared["tokens"] == sum(len(ids) for ids, _ in job.sequences("rows"))
    assert job.prepared["rows"] == len(found["step_tokens"]) * 8 == 24
    assert found["tokens"] == sum(found["step_tokens"][1:])
    assert found["items"] == 5
    assert 0 < found["loss"] < 5
    assert found["plan"]["dtype"] == "float32"
    assert found["weights"] == 4 * 2 * (4 * 32 * 32 + 2 * 32 * 64) + 4 * 32 * 32
    assert found["memory"] > 0
    json.dumps(found)


def test_the_textbook_is_measured_on_the_same_rows(job):
    found = measure(replace(job, contender=replace(TEXTBOOK, part=1)))
    assert found["all_tokens"] == job.prepared["tokens"]
    assert found["trainable_parameters"] > found["frozen_bytes"]


def test_ours_predicts_with_the_adapter_that_was_prepared(job, tmp_path):
    folder = tmp_path / "predicts"
    folder.mkdir()
    work = replace(job.work, predicts=True, steps=3)
    prepare.prepare(work, folder, "cpu")
    found = measure(Job(work, OURS_FP32, folder, seed=7, device="cpu"))
    assert len(found["step_tokens"]) == 2
    assert found["tokens"] == sum(len(ids) for ids, _ in job.sequences("rows"))


def test_the_loss_is_the_mean_over_items_whatever_the_padding(tmp_path):
    """Two rows of a chat: targets -100 and padding count for nothing."""
    (tmp_path / "prepared.json").write_text(json.dumps({"chats": True}))
    sequences = [[[1, 2, 3], [-100, 3, -100]], [[1, 1, 1, 1, 1], [0, -100, -100, 2, 1]]]
    (tmp_path / "tokens.json").write_text(json.dumps({"held_out": sequences}))
    scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    made = Made(lambda ids, mask: scores[ids] * mask[..., None], 0, 0, 0)
    job = Job(WORKS["c"], Contender("ours", "ours", "fp32"), tmp_path, 7, "cpu")
    loss, items = held_out_loss(made, job)
    logs = scores.log_softmax(-1)
    assert items == 4
    assert loss == pytest.approx(float(-(logs[2, 3] + logs[1, 0] + logs[1, 2] + logs[1, 1]) / 4), rel=1e-6)


def test_goals_know_what_is_better():
    assert Goal("a", "weights", "ours int8", (), 0.5).met(0.4)
    assert Goal("a", "share of limit", "ours bf16", (), 0.25).met(0.3)


def test_the_readme_tells_of_every_work_and_file():
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert set(WORKS) == set(re.findall(r"^\| ([a-z]) \|", text, re.MULTILINE))
    files = {path.name for path in BENCHMARKS.glob("*.py")} - {"__init__.py", "job.py"}
    assert files <= set(re.findall(r"`(\w+\.py)`", text))
