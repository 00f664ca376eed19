"""Limits of memory that the system sets: they are found, and a plan counts with them."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from lowres_ft import allocator, budget, device, least, outside
from lowres_ft.errors import ModelError
from lowres_ft.outside import Outside
from lowres_ft.recipe import load_recipe

MIB = 2**20
TAKEN = allocator.Taken(mapped=900 * MIB, resident=400 * MIB, data=350 * MIB)


def test_a_limit_says_what_is_left_and_what_may_be_resident():
    data, everything = Outside("RLIMIT_DATA", 1000 * MIB), Outside("RLIMIT_AS", 1000 * MIB)
    assert (data.left(TAKEN), data.may_be_resident(TAKEN)) == (650 * MIB, 1000 * MIB)
    assert (everything.left(TAKEN), everything.may_be_resident(TAKEN)) == (100 * MIB, 500 * MIB)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they hold nothing")
def test_limits_of_this_process_are_found():
    code = (
        "import resource; from lowres_ft import outside\n"
        "print(outside.found(), outside.tightest())\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, -1))\n"
        "print(outside.found(), outside.tightest())\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 29, -1))\n"
        "print(len(outside.found()), outside.tightest()[0], 2**28 < outside.tightest()[1] <= 2**29)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    first, second, third = done.stdout.splitlines()
    assert first == "() None"
    assert second == f"(Outside(name='RLIMIT_DATA', most={2**30}),) ('RLIMIT_DATA', {2**30})"
    assert third == "2 RLIMIT_AS True"


def test_a_plan_counts_with_a_limit_on_a_processor(monkeypatch):
    machine = device.find("cpu")
    monkeypatch.setattr(outside, "tightest", lambda: ("RLIMIT_DATA", 800 * MIB))
    for told, room in (("500MiB", 500 * MIB), ("2GiB", 800 * MIB), ("auto", 800 * MIB)):
        assert budget.room(load_recipe("sentiment-lora", [f"budget.memory={told}"]), machine) == room
    assert budget.room(load_recipe("sentiment-lora", []), machine) is None


def test_a_limit_below_what_a_run_takes_at_least_is_told_by_its_name(monkeypatch):
    monkeypatch.setattr(least, "_may_have_gpu", lambda: False)
    monkeypatch.setattr(outside, "tightest", lambda: ("RLIMIT_DATA", 300 * MIB))
    for told in ("2GiB", "auto"):
        said = r"^budget.memory: 300 MiB by RLIMIT_DATA, which the system sets are less than the "
        with pytest.raises(ModelError, match=said) as caught:
            least.require(load_recipe("sentiment-lora", [f"budget.memory={told}"]))
        assert "leave it out" not in caught.value.hint
    with pytest.raises(ModelError, match=r"^budget.memory: 299 MiB are less than the "):  # which is less
        least.require(load_recipe("sentiment-lora", ["budget.memory=299MiB"]))
    most = least.libraries("cpu") + MIB
    monkeypatch.setattr(outside, "tightest", lambda: ("RLIMIT_AS", most))
    with pytest.raises(ModelError, match=r"may take \d+ MiB by RLIMIT_AS, which the system sets: libraries take"):
        least.require(load_recipe("sentiment-lora", ["budget.memory=auto"]))
    least.require(load_recipe("sentiment-lora", []))  # which sets no bound, so that nothing is told before it is tried


def test_a_plan_that_fits_nowhere_names_the_limit(monkeypatch):
    recipe, plan = load_recipe("sentiment-lora", []), SimpleNamespace(device="cpu", dtype="bfloat16")
    monkeypatch.setattr(budget, "plans", lambda *_: iter([plan]))
    for limit, told in ((None, ""), (("RLIMIT_DATA", 5 * MIB), " by RLIMIT_DATA, which the system sets")):
        monkeypatch.setattr(outside, "tightest", lambda limit=limit: limit)
        with pytest.raises(ModelError) as caught:
            budget.settle(recipe, plan, None, 5 * MIB, lambda *_: 9 * MIB)
        assert caught.value.message == f"this run needs 9.0 MiB at least, and may take 5.0 MiB{told}"


def test_a_run_without_a_bound_that_runs_out_hears_of_the_limit(monkeypatch):
    machine, limit = device.find("cpu"), Outside("RLIMIT_DATA", 10 * MIB)
    monkeypatch.setattr(outside, "found", lambda: (limit,))
    told = budget.advice(load_recipe("sentiment-lora", ["model.base=/nowhere"]), machine)
    assert told.startswith("With budget.memory=auto the plan counts with RLIMIT_DATA, which the system sets. Give it ")
    told = budget.advice(load_recipe("sentiment-lora", ["model.base=/nowhere", "budget.memory=9MiB"]), machine)
    assert told.startswith("Give it ")
