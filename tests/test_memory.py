"""The memory model: its terms, and the process's own peak."""

import json
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

from lowres_ft import allocator, device, memory, tables
from lowres_ft.memory import Fitted, Memory
from lowres_ft.simulate import Account, Held, Pass

TERMS = dict.fromkeys(Memory.__dataclass_fields__, 0)


def test_the_fitted_constants_are_sizes_of_a_process():
    for kind in ("cpu", "heap", "cuda"):
        fitted = Fitted.model_validate(tables.read("memory")[kind])
        assert 3e8 < fitted.libraries < 1e9
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
