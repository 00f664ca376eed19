"""The memory model: its terms, its fit, and the process's own peak."""

import json
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from benchmarks import memory as judge
from benchmarks import memory_runs, shapes
from lowres_ft import allocator, device, memory, tables
from lowres_ft.memory import Fitted, Memory
from lowres_ft.simulate import Account, Held, Pass

TERMS = dict.fromkeys(Memory.__dataclass_fields__, 0)


def result(in_heap, *, mapped, single, measured, linears):
    told = Memory(**TERMS | {"linears": linears * 10**6, "allocator": 77, "libraries": 88})
    return judge.Result(memory_runs.FITTED[0], told, 1e6 * in_heap, mapped, single, measured * 10**6)


def test_a_fit_finds_what_was_put_in_whatever_was_told_before():
    results = [
        result(100, mapped=True, single=True, measured=480 + 60 + 25 + 10, linears=10),
        result(400, mapped=True, single=False, measured=480 + 60 + 30 + 100 + 90, linears=90),
        result(200, mapped=False, single=False, measured=480 + 60 + 30 + 150 + 70, linears=70),
        result(0, mapped=False, single=True, measured=480 + 60 + 500, linears=500),
    ]
    found = judge.fit(results, 480 * 10**6)
    assert [(one["model_code"], one["sixteen"]) for one in found.values()] == [
        pytest.approx((60e6, 30e6), rel=1e-3)
    ] * 2
    assert (found["cpu"]["fragmentation"], found["heap"]["fragmentation"]) == pytest.approx((0.25, 0.75), rel=1e-3)
    of_fp32 = judge.fit([one for one in results if one.single], 480 * 10**6)
    assert all("sixteen" not in constants for constants in of_fp32.values())  # none tells of it, so it stays


def test_the_runs_that_judge_are_not_those_that_were_fitted():
    assert not set(memory_runs.FITTED) & set(memory_runs.JUDGED)
    assert len(memory_runs.FITTED) == 12
    assert len(memory_runs.JUDGED) >= 16
    keys = [run.key for run in (*memory_runs.FITTED, *memory_runs.JUDGED)]
    assert len({*keys}) == len(keys)
    assert {run.shape for run in (*memory_runs.FITTED, *memory_runs.JUDGED)} == {*shapes.SHAPES}


def test_every_run_is_a_recipe(tmp_path):
    for run in (*memory_runs.FITTED, *memory_runs.JUDGED):
        found = shapes.recipe(tmp_path, tmp_path / "rows.jsonl", run.task, run.length, *run.settings)
        assert found.task.max_length == run.length


def test_the_fitted_constants_are_sizes_of_a_process():
    for kind in ("cpu", "heap", "cuda"):
        fitted = Fitted.model_validate(tables.read("memory")[kind])
        assert 3e8 < fitted.libraries + fitted.model_code < 1e9
        assert 0 <= fitted.fragmentation < 1


def test_loading_may_take_more_than_training():
    held = Memory(**TERMS | {"libraries": 10, "activations": 5, "loading": 40})
    assert held.total == 40
    assert "loading" not in held.terms
    assert held.to_json() == {"total": 40, **asdict(held)}


def kept(profile, plan, *, rows, activations=30e6):
    of = Held(
        **dict.fromkeys(("linears", "embeddings", "others", "heads", "adapter", "optimizer", "best", "largest"), 0)
    )
    account = Account(rows, 128, of, Pass({"activations": activations}, {}), Pass({"activations": 2 * activations}, {}))
    return memory.kept_in_heap(account, profile, plan)


def test_inputs_of_recomputed_layers_leave_holes_where_they_lie_in_the_heap(monkeypatch):
    monkeypatch.setattr(allocator, "maps", lambda hidden: hidden >= 512)
    narrow, wide = (SimpleNamespace(hidden=hidden) for hidden in (384, 576))
    plan = SimpleNamespace(device="cpu", recompute="layers", dtype="bfloat16")
    assert kept(narrow, plan, rows=32) == 30e6
    assert kept(wide, plan, rows=8) == 30e6  # 1.2 MB each
    assert kept(wide, plan, rows=16) == 0  # 2.4 MB, which are mapped
    assert kept(wide, SimpleNamespace(**vars(plan) | {"dtype": "float32"}), rows=8) == 0
    assert kept(wide, SimpleNamespace(**vars(plan) | {"recompute": "selective"}), rows=8) == 0
    assert kept(wide, SimpleNamespace(**vars(plan) | {"device": "cuda"}), rows=8) == 0


def test_a_peak_is_the_process_s_own_and_not_its_parent_s():
    code = "from lowres_ft.device import peak_bytes; print(peak_bytes('cpu'))"
    parent = (
        "import subprocess, sys; held = bytearray(3 * 2**30 // 2); held[::4096] = b'x' * len(held[::4096]);"
        f"print(subprocess.run([sys.executable, '-c', {code!r}], capture_output=True, text=True, check=True).stdout)"
    )
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 10**8 < json.loads(done.stdout) < 10**9
    assert device.peak_bytes("cpu") > 10**8
