from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from lowres_ft import bases as base_module
from lowres_ft import budget, device, least, limits, memory, profiles
from lowres_ft import plan as plans
from lowres_ft.changes import Remedy, Together
from lowres_ft.errors import ModelError, RecipeError
from lowres_ft.methods.lora import Lora
from tests import conftest


@pytest.fixture
def made(bases, reviews):
    """A recipe on a tiny base, its profile, and a plan with room to save."""

    def make(*changes):
        recipe = conftest.recipe(bases("bert"), reviews, *changes)
        base = base_module.resolve(recipe.model)
        profile = profiles.profile(base, recipe.task)
        return recipe, base, profile, plans.make(recipe, profile, device.find("cpu"))

    return make


def needs(recipe, plan):
    """Bytes of an imagined run: 100 a token, less where it is told to save."""
    factor = {"none": 100, "selective": 60, "layers": 30}[plan.recompute]
    factor -= 5 * ("kept" not in plan.attention_kernels.values())
    held = {"none": 80_000, "int8": 40_000, "nf4": 20_000}[recipe.model.quantize]
    return held + factor * plan.micro_batch_tokens * recipe.task.max_length // 32


def test_what_fits_is_left_as_it_is(made):
    recipe, _, profile, plan = made()
    assert budget.settle(recipe, plan, profile, 10**9, needs) == plan


def test_plans_get_more_frugal_in_the_order_of_what_that_costs(made):
    recipe, _, profile, plan = made()
    *found, last = budget.plans(recipe, plan, profile)
    assert [(one.micro_batch_tokens, one.recompute) for one in found[:-1]] == [
        (2048, "none"),
        (1024, "none"),
        (512, "none"),
        (256, "none"),
        (256, "selective"),
        (256, "layers"),
    ]
    assert set(found[-2].attention_kernels.values()) == {"kept"}
    assert set(found[-1].attention_kernels.values()) == {"recomputed"}
    assert {one.offload for one in found} == {"none"}
    assert last == found[-1].model_copy(update={"offload": "layers"})
    assert all(one.evaluation_tokens == 2 * one.micro_batch_tokens for one in found)


@pytest.mark.parametrize(
    ("most", "tokens", "recompute"),
    [(290_000, 2048, "none"), (200_000, 1024, "none"), (106_000, 256, "none"), (96_000, 256, "selective")],
)
def test_the_first_plan_that_fits_is_taken(most, tokens, recompute, made):
    recipe, _, profile, plan = made()
    found = budget.settle(recipe, plan, profile, most, needs)
    assert (found.micro_batch_tokens, found.recompute) == (tokens, recompute)
    assert needs(recipe, found) <= most


def test_a_plan_that_needs_less_than_a_more_frugal_one_is_found(made):
    recipe, _, profile, plan = made()

    def odd(recipe, plan):
        return needs(recipe, plan) + 20_000 * (plan.recompute == "layers")

    found = budget.settle(recipe, plan, profile, 98_000, odd)
    assert found.recompute == "selective"
    assert odd(recipe, found) <= 98_000 < odd(recipe, list(budget.plans(recipe, plan, profile))[-1])


def test_what_the_recipe_fixes_stays(made):
    recipe, _, profile, plan = made("budget.recompute=none", "model.dropout=0.1")
    found = list(budget.plans(recipe, plan, profile))
    assert {(one.micro_batch_tokens, one.recompute) for one in found} == {(2048, "none")}


def test_where_nothing_fits_every_change_is_told_with_what_it_saves(made):
    recipe, _, profile, plan = made()
    with pytest.raises(ModelError, match=r"needs 84 KiB at least, and may take 1000 B") as caught:
        budget.settle(recipe, plan, profile, 1000, needs)
    assert caught.value.hint.split("; ") == [
        "model.quantize=nf4 saves 59 KiB",
        "model.quantize=int8 saves 39 KiB",
        "task.max_length=16 saves 3.1 KiB",
    ]


def large(recipe, plan):
    """An imagined run a thousand times as large."""
    return 1000 * needs(recipe, plan)


@pytest.mark.parametrize(
    ("most", "told", "works"),
    [
        (30_000_000, "model.quantize=nf4 alone makes it 25 MiB, which fits", True),
        (24_000_000, "model.quantize=nf4 task.max_length=16 together makes it 22 MiB, which fits", True),
        (1_000_000, "all of it together makes it 22 MiB, which is still too much: use a smaller base", False),
    ],
)
def test_the_error_names_what_is_enough_and_it_is(most, told, works, made):
    recipe, _, profile, plan = made()
    with pytest.raises(ModelError) as caught:
        budget.settle(recipe, plan, profile, most, large)
    *_, last = caught.value.hint.split("; ")
    assert last.endswith(told) if not works else last == told
    if works:
        changes = [word for word in last.split() if "=" in word]
        again, *_ = made(*changes)
        assert large(again, budget.settle(again, plan, profile, most, large)) <= most


@pytest.mark.parametrize("said", ["auto", "float32"])
def test_where_fp32_computes_bf16_is_a_remedy(said, made):
    recipe, _, _, plan = made(f"model.dtype={said}")
    plan = plan.model_copy(update={"dtype": "float32"})

    def wide(one, by):
        return {"float32": 4, "bfloat16": 2}[by.dtype]

    assert budget.ways(plan, wide).remedies(recipe, 4) == [Remedy("model.dtype=bfloat16", 2)]
    together = budget.ways(plan, lambda *one: 10**9 * wide(*one)).together(recipe, 4 * 10**9, 3 * 10**9)
    assert together == Together(("model.dtype=bfloat16",), 2 * 10**9)


def test_full_fine_tuning_is_told_of_lora(made):
    recipe, _, _, plan = made("method={kind: full}")

    def held(one, _):
        return 10 if isinstance(one.method, Lora) else 100

    assert Remedy("method.kind=lora", 90) in budget.ways(plan, held).remedies(recipe, 100)


def test_a_change_that_this_base_does_not_take_is_no_remedy(made):
    recipe, base, profile, plan = made()  # of 32 inputs, which blocks of nf4 do not divide
    ways = budget.ways(plan, lambda one, by: memory.estimate(one, base, profile, by)[0].total)
    changes = [remedy.change for remedy in ways.remedies(recipe, 10**12)]
    assert "model.quantize=int8" in changes
    assert "model.quantize=nf4" not in changes


def test_a_real_account_fits_what_it_says(made):
    recipe, base, profile, plan = made("budget.memory=1GiB")
    found, _ = memory.estimate(recipe, base, profile, plan)
    assert sum(found.terms.values()) <= found.total == found.to_json()["total"]
    assert budget.within(recipe, base, profile, plan, device.find("cpu")) in list(budget.plans(recipe, plan, profile))


def test_nothing_is_accounted_for_twice(made, monkeypatch):
    recipe, base, profile, plan = made("budget.memory=1MiB")
    asked = []

    def counted(one, base, profile, by, lengths):
        asked.append((one, by))
        if one.model.quantize == "nf4":
            raise ModelError("its blocks do not divide the widths")
        return SimpleNamespace(total=large(one, by)), None

    monkeypatch.setattr(memory, "estimate", counted)
    with pytest.raises(ModelError, match="this run needs"):
        budget.within(recipe, base, profile, plan, device.find("cpu"))
    assert any(one.model.quantize == "nf4" for one, _ in asked)
    keys = [one.model_dump_json() + by.model_dump_json() for one, by in asked]
    assert len(keys) == len(set(keys))
    assert [one for one, _ in asked].count(recipe) == 2  # by the first plan and by the most frugal one


@pytest.mark.parametrize("command", ["recipe", "plan"])
def test_a_base_that_cannot_be_accounted_for_ends_in_one_error_where_memory_is_bound(
    command, lowres, bases, reviews, tmp_path, monkeypatch
):
    def fails(*_):
        raise RuntimeError("data-dependent\nmore")

    monkeypatch.setattr(limits, "held", lambda *_: nullcontext())
    monkeypatch.setattr(memory, "estimate", fails)
    path = tmp_path / "mine.yaml"
    path.write_text(conftest.recipe(bases("bert"), reviews, "budget.memory=2GiB").to_yaml(), encoding="utf-8")
    code, _, told = lowres(command, path, *(("--out", tmp_path / "out") if command == "recipe" else ()), "--quiet")
    assert code == 2
    assert told.splitlines()[-2:] == [
        "error: what this base takes cannot be told before it runs: data-dependent",
        "hint: A run without budget.memory may well work.",
    ]


def test_a_run_that_cannot_fit_ends_before_weights_are_read(lowres, bases, reviews, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "held", lambda *_: nullcontext())  # the process of the tests takes more already
    path = tmp_path / "mine.yaml"
    wanted = conftest.recipe(bases("bert"), reviews, f"budget.memory={least.libraries('cpu') + 2**20}B")
    path.write_text(wanted.to_yaml(), encoding="utf-8")
    code, _, told = lowres("recipe", path, "--out", tmp_path / "out", "--device", "cpu")
    assert code == 2
    assert "this run needs" in told
    assert "loading" not in told


@pytest.mark.parametrize("value", ["6", "lots", "0GiB", "6gib", ".5GiB", "9000000TiB", "9" * 400 + "GiB"])
def test_a_budget_is_a_size(value, bases, reviews):
    with pytest.raises(RecipeError, match=r"budget\.memory: must be"):
        conftest.recipe(bases("bert"), reviews, f"budget.memory='{value}'")


def test_the_room_is_what_was_asked_for_or_what_is_free(made):
    machine = device.find("cpu")
    assert budget.room(made()[0], machine) is None
    assert budget.room(made("budget.memory=2GiB")[0], machine) == 2 * 1024**3
    assert 0 < budget.room(made("budget.memory=auto")[0], machine) <= device.total_bytes("cpu")


def test_auto_leaves_a_reserve(made, monkeypatch):
    monkeypatch.setattr(device, "free_bytes", lambda _: 10 * 2**30)
    monkeypatch.setattr(device, "total_bytes", lambda _: 40 * 2**30)
    assert budget.room(made("budget.memory=auto")[0], device.find("cpu")) == 8 * 2**30
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # each leaves its share
    assert budget.room(made("budget.memory=auto")[0], device.find("cpu")) == 10 * 2**30 - 2**29
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(device, "total_bytes", lambda _: 2**30)
    assert budget.room(made("budget.memory=auto")[0], device.find("cpu")) == 10 * 2**30 - 512 * 2**20
