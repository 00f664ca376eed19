"""What every plug-in promises: found by walking the folders."""

import inspect
from pathlib import Path

import pytest

import lowres_ft
from lowres_ft import registry
from lowres_ft.checks.base import Check
from lowres_ft.errors import RecipeError
from lowres_ft.methods import head
from lowres_ft.methods.base import Method
from lowres_ft.spec import Spec
from lowres_ft.tasks.base import Task

BASES = {"tasks": Task, "methods": Method, "checks": Check}
COUNTS = {"tasks": 3, "methods": 5, "checks": 12}
PLUGINS = [
    (folder, path.stem)
    for folder in BASES
    for path in sorted((Path(lowres_ft.__file__).parent / folder).glob("*.py"))
    if path.stem != "base" and not path.stem.startswith("_")
]


@pytest.mark.parametrize("folder", BASES)
def test_names_are_the_files_of_the_folder(folder):
    assert list(registry.names(folder)) == [name for place, name in PLUGINS if place == folder]
    assert len(registry.names(folder)) == COUNTS[folder]


@pytest.mark.parametrize(("folder", "name"), PLUGINS)
def test_a_plugin_is_one_class_with_its_files_name(folder, name):
    plugin = registry.load(folder, name)
    assert issubclass(plugin, BASES[folder])
    assert plugin.__name__.casefold() == name
    assert plugin.model_fields["kind"].default == name
    with pytest.raises(ValueError, match="kind"):
        plugin(kind="other")


@pytest.mark.parametrize(("folder", "name"), PLUGINS)
def test_a_plugin_needs_nothing_and_explains_itself(folder, name):
    plugin = registry.load(folder, name)
    assert plugin().kind == name
    assert "__doc__" in vars(plugin)
    assert len(plugin.__doc__) > 20
    unexplained = [key for key, field in plugin.model_fields.items() if key != "kind" and not field.description]
    assert unexplained == []


@pytest.mark.parametrize("name", [name for folder, name in PLUGINS if folder == "methods"])
def test_a_method_answers_what_the_model_asks(name):
    method = registry.load("methods", name)()
    layers = ("layer.key", "layer.value", "layer.output.dense")
    chosen = method.choose(layers)
    assert set(chosen) <= set(layers)
    assert all(method.adapter(layer) is not None for layer in chosen)
    assert not (method.trains_base and chosen)
    assert method.conflict("none") is None
    assert bool(method.conflict("int8")) == method.trains_base


def source_of(value: object) -> str:
    function = value.fget if isinstance(value, property) else value
    return inspect.getsource(function) if inspect.isfunction(function) else ""


@pytest.mark.parametrize("name", [name for folder, name in PLUGINS if folder == "tasks"])
def test_a_task_says_what_the_pipeline_asks(name):
    task = registry.load("tasks", name)
    assert task.example
    for words in (task.model_class, task.peft_type, task.metric):
        assert words
    needed = [key for key, value in vars(Task).items() if "NotImplementedError" in source_of(value)]
    assert len(needed) >= 7
    missing = [key for key in needed if key not in vars(task)]
    assert missing == [], "a task answers all that the base only names"


def test_every_plugin_was_seen():
    assert len(PLUGINS) == sum(COUNTS.values())
    assert issubclass(registry.load("methods", "lora"), Spec)


def test_a_second_name_for_the_class_does_not_matter_and_a_second_class_is_told(monkeypatch):
    monkeypatch.setattr(head, "PLUGIN", head.Head, raising=False)
    assert registry.load("methods", "head") is head.Head

    class Other(Method):
        __module__ = head.__name__

    monkeypatch.setattr(head, "Other", Other, raising=False)
    with pytest.raises(RecipeError, match=r"'head' is no plug-in: .* one subclass of Method, found Head, Other"):
        registry.load("methods", "head")


@pytest.mark.parametrize("name", ["lroa", "base", "__init__", "", None, 3, ["lora"], "lora.x"])
def test_an_unknown_name_is_told_with_those_that_are_known(name):
    with pytest.raises(RecipeError, match="must be one of dora, full, head, ia3, lora, found") as caught:
        registry.load("methods", name)
    assert ("did you mean 'lora'" in caught.value.message) == (name in ("lroa", "lora.x", ["lora"]))
