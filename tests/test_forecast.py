import json

import pytest

from lowres_ft import catalogue, device, forecast, limits, profiles, speed
from lowres_ft import plan as plans
from lowres_ft.bases import Base
from lowres_ft.errors import ModelError
from lowres_ft.ledger import Cost
from lowres_ft.recipe import load_recipe
from lowres_ft.simulate import Pass
from tests import conftest

SLOW = speed.Rates(flops={"float32": 1e12, "bfloat16": 2e12}, bandwidth=1e10, link=1e9)


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    monkeypatch.setattr(speed, "known", lambda machine: SLOW)


def outlook(base, reviews, *changes, **options):
    return forecast.outlook(conftest.recipe(base, reviews, *changes), device_name="cpu", **options)


def test_an_operation_takes_as_long_as_its_products_or_its_bytes():
    share = speed.Share.model_validate(speed.tables.read("speed")["cpu"])
    products, copies = Pass({}, {Cost(1e12, 8): 3.0}), Pass({}, {Cost(0.0, 10**10): 2.0})
    functions = Pass({}, {Cost(0.0, 10**8, function=True): 4.0})
    assert speed.seconds(products, "float32", SLOW, share) == pytest.approx(3 / share.products, rel=1e-3)
    assert speed.seconds(products, "bfloat16", SLOW, share) == pytest.approx(1.5 / share.products, rel=1e-3)
    assert speed.seconds(copies, "float32", SLOW, share) == pytest.approx(2 / share.bandwidth, rel=1e-3)
    assert speed.seconds(functions, "float32", SLOW, share) == pytest.approx(0.04 / share.functions, rel=1e-3)


def test_the_outlook_names_this_machine_and_usual_ones(bases, reviews):
    found = outlook(bases("bert"), reviews, "model.dtype=auto")
    names = [one.target.machine.name for one in found.others]
    assert names == ["Colab T4", "RTX 4060", "RTX 3060", "RTX 4090", "A100 40 GB", "A100 80 GB"]
    assert all(one.fits and one.tokens_per_second > 0 for one in (found.here, *found.others))
    assert found.others[0].plan.dtype == "float16"
    terms = found.here.memory.terms
    assert {"linears", "embeddings", "adapter", "gradients", "optimizer", "activations"} <= terms.keys()
    assert found.here.memory.total >= sum(terms.values())
    assert json.loads(json.dumps(found.here.to_json()))["memory"]["total"] == found.here.memory.total


def test_weights_are_not_asked_for_and_labels_not_either(bases, reviews, tmp_path):
    (tmp_path / "config.json").write_bytes((bases("bert") / "config.json").read_bytes())
    found = outlook(tmp_path, reviews, "task.labels=null", "data.train=missing.csv")
    assert found.trainable_parameters > 0


def test_processes_share_a_step(bases, reviews):
    one, four = (outlook(bases("bert"), reviews, processes=count).here for count in (1, 4))
    assert four.memory.activations < one.memory.activations
    assert four.plan.processes == 4
    assert four.step_seconds < one.step_seconds


def test_what_does_not_fit_is_told_with_what_would_help(bases, reviews):
    base = bases("bert", hidden_size=256, intermediate_size=1024)
    found = outlook(base, reviews, "budget.memory=1MiB")
    assert not found.here.fits
    assert "model.quantize=int8" in [remedy.change for remedy in found.here.remedies]
    assert found.others[0].fits


def test_layers_pass_where_nothing_else_fits_and_no_faster_than_they_come(bases, reviews):
    base = bases("bert", num_hidden_layers=8, hidden_size=256, intermediate_size=1024)
    changes = ("budget.recompute=layers", "task.max_length=8")
    resident = outlook(base, reviews, *changes, "budget.offload=none", "budget.memory=99GiB").here
    most = limits.given(resident.memory.total, "cpu") - 5 * 2**20
    found = outlook(base, reviews, *changes, f"budget.memory={most // 2**20}MiB").here
    assert found.fits
    assert found.settings[-1] == "offload=layers"
    layers = 8 * 4 * (2 * 256 * 1024 + 4 * 256 * 256)
    steps = 8 * 8 / found.plan.micro_batch_tokens
    assert found.step_seconds >= steps * 2 * layers / SLOW.link
    assert speed.passing(layers, SLOW) == pytest.approx(2 * layers / 1e9)


def test_plan_prints_a_table(lowres, bases, reviews, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(conftest.recipe(bases("bert"), reviews).to_yaml(), encoding="utf-8")
    code, printed, _ = lowres("plan", path, "--device", "cpu", "--processes", "2")
    assert code == 0
    lines = printed.splitlines()
    assert lines[0].startswith("tiny: lora trains ")
    assert [line.split("  ")[0] for line in lines[-8:]][:2] == ["this machine", "Colab T4"]
    assert "--dry-run" in lines[-1]
    code, printed, _ = lowres("plan", path, "--device", "cpu", "--json")
    found = json.loads(printed)
    assert code == 0
    assert found["here"]["fits"] is True
    assert len(found["others"]) == 6
    assert lowres("plan", path, "--processes", "0")[0] == 2


def test_the_catalogue_counts_parameters_as_transformers_does(tmp_path):
    counted = 0
    for entry in catalogue.entries():
        folder = tmp_path / str(counted)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(entry.config))
        chats = "chat" in entry.tasks
        recipe = load_recipe("chat-lora-int8" if chats else "sentiment-lora", [f"model.base={entry.name}"])
        found = profiles.profile(Base(entry.name, folder, entry.name), recipe.task)
        assert (found.parameters - found.head_parameters) / 1e6 == pytest.approx(entry.parameters, rel=0.015), (
            entry.name
        )
        assert found.positions is None or found.positions == entry.context, entry.name
        counted += 1
    assert counted == 23


def test_every_task_has_bases_of_the_catalogue_in_english_and_chinese():
    for task in ("classification", "ner", "chat"):
        for language in ("en", "zh"):
            assert catalogue.chosen(task, language), (task, language)
    assert all(entry.speaks("zh") for entry in catalogue.chosen("chat", "zh"))


@pytest.mark.parametrize(("task", "language"), [("clasification", None), ("ner", "xx-none"), ("chat", "")])
def test_what_nothing_serves_is_told(task, language):
    if language == "xx-none":
        assert {entry.languages.split()[0] for entry in catalogue.chosen(task, language)} == {"multi"}
        return
    if language == "":
        assert catalogue.chosen(task, None)
        return
    with pytest.raises(ModelError, match="did you mean 'classification'"):
        catalogue.chosen(task, language)


def test_models_lists_what_fits(lowres, monkeypatch):
    small = catalogue.chosen("classification", "en")[:1]
    monkeypatch.setattr(catalogue, "chosen", lambda task, language: small)
    code, printed, _ = lowres("models", "--task", "classification", "--device", "cpu", "--json")
    (found,) = json.loads(printed)
    assert code == 0
    assert found["name"] == "starter:minilm-l6"
    assert found["here"]["recipe"] == "sentiment-lora"
    assert 5e8 < found["here"]["memory_bytes"] < 2e9
    code, printed, _ = lowres("models", "--device", "cpu")
    assert "starter:minilm-l6" in printed


def test_devices_of_the_table_have_plans_without_being_here(bases, reviews):
    recipe = conftest.recipe(bases("bert"), reviews, "model.dtype=auto")
    base = Base("x", bases("bert"), "x")
    for target in forecast.usual():
        plan = plans.make(recipe, profiles.profile(base, recipe.task), target.machine)
        assert plan.attention == "sdpa"
        assert target.memory > 2**32
    assert device.find("cpu").name
