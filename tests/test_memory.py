"""The memory model: its terms, and the process's own peak."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from lowres_ft import allocator, device, memory, profiles, simulate
from lowres_ft import bases as base_module
from lowres_ft import plan as plans
from lowres_ft.memory import Fitted, Memory
from lowres_ft.simulate import Account, Held, Pass
from tests import conftest


@pytest.fixture
def made(bases, reviews):
    """A recipe on a tiny base, its base, its profile and its plan."""
    recipe = conftest.recipe(bases("bert"), reviews)
    base = base_module.resolve(recipe.model)
    profile = profiles.profile(base, recipe.task)
    return recipe, base, profile, plans.make(recipe, profile, device.find("cpu"))


NOTHING = Held(
    **dict.fromkeys(("linears", "embeddings", "others", "heads", "adapter", "optimizer", "best", "largest"), 0)
)
TERMS = dict.fromkeys(Memory.__dataclass_fields__, 0)


def test_the_fitted_constants_are_sizes_of_a_process():
    for kind in ("bound", "heap", "heap-aside", "mapped", "cuda"):
        fitted = Fitted.of(kind)
        assert 3e8 < fitted.libraries < 1e9
        assert 0 <= fitted.fragmentation < 1


def test_loading_may_take_more_than_training():
    held = Memory(**TERMS | {"libraries": 10, "activations": 5, "loading": 40})
    assert held.total == 40
    assert "loading" not in held.terms
    assert held.to_json() == {"total": 40, **asdict(held)}


def kept(profile, plan, *, rows, kind):
    account = Account(rows, 128, NOTHING, Pass({"activations": 30e6}, {}), Pass({"activations": 60e6}, {}))
    return memory.kept_in_heap(account, profile, plan, kind)


def test_inputs_of_recomputed_layers_leave_holes_where_they_lie_in_the_heap():
    narrow, wide = (SimpleNamespace(hidden=hidden) for hidden in (384, 576))
    plan = SimpleNamespace(recompute="layers", dtype="bfloat16")
    assert kept(narrow, plan, rows=32, kind="heap") == 30e6
    assert kept(wide, plan, rows=8, kind="mapped") == 30e6  # 1.2 MB each
    assert kept(wide, plan, rows=16, kind="mapped") == 0  # 2.4 MB, which are mapped
    assert kept(wide, plan, rows=1, kind="bound") == 30e6  # 0.15 MB
    assert kept(wide, plan, rows=2, kind="bound") == 0
    assert kept(wide, SimpleNamespace(**vars(plan) | {"dtype": "float32"}), rows=8, kind="mapped") == 0
    assert kept(wide, SimpleNamespace(**vars(plan) | {"recompute": "selective"}), rows=8, kind="mapped") == 0
    assert kept(wide, plan, rows=8, kind="cuda") == 0


def test_the_kind_of_heap_is_that_of_the_process(monkeypatch):
    monkeypatch.setattr(allocator, "maps", lambda hidden: hidden >= 512)
    free, bound = (SimpleNamespace(budget=SimpleNamespace(memory=memory)) for memory in (None, "auto"))
    narrow, wide = (SimpleNamespace(hidden=hidden) for hidden in (384, 576))
    cpu, gpu = (SimpleNamespace(device=device) for device in ("cpu", "cuda:0"))
    monkeypatch.setattr(allocator, "tightens", lambda: True)
    monkeypatch.setattr(allocator, "sets_aside", lambda: True)
    assert [memory.heap(free, one, cpu) for one in (narrow, wide)] == ["heap-aside", "mapped"]
    assert [memory.heap(bound, one, cpu) for one in (narrow, wide)] == ["bound", "bound"]
    assert memory.heap(bound, wide, gpu) == "cuda"
    monkeypatch.setattr(allocator, "tightens", lambda: False)
    assert memory.heap(bound, wide, cpu) == "mapped"
    monkeypatch.setattr(allocator, "sets_aside", lambda: False)
    assert memory.heap(bound, narrow, cpu) == "heap"


@pytest.mark.parametrize(("weights", "expected"), [(0, 100 + 40), (900, 900 + 900)])
def test_a_copy_of_the_best_tensors_is_there_after_the_only_evaluation(weights, expected, made, monkeypatch):
    """Beside gradients, and not beside what a step or an evaluation computes with."""
    held = replace(NOTHING, best=weights)
    passes = Pass({"activations": 100, "gradients": 40}, {}), Pass({"activations": 20, "gradients": weights}, {})
    monkeypatch.setattr(simulate, "accounts", lambda *_: [Account(1, 1, held, *passes)])
    told = {on: memory.estimate(*made, goes_on=on)[0] for on in (True, False)}
    tensors = {on: one.activations + one.gradients + one.best for on, one in told.items()}
    assert tensors[False] == expected
    assert tensors[True] == max(140, 20 + weights) + weights


def test_a_peak_is_the_process_s_own_and_not_its_parent_s():
    code = "from lowres_ft.device import peak_bytes; print(peak_bytes('cpu'))"
    parent = (
        "import subprocess, sys; held = bytearray(3 * 2**30 // 2); held[::4096] = b'x' * len(held[::4096]);"
        f"print(subprocess.run([sys.executable, '-c', {code!r}], capture_output=True, text=True, check=True).stdout)"
    )
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 10**8 < json.loads(done.stdout) < 10**9
    assert device.peak_bytes("cpu") > 10**8
