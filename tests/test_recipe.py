"""Recipes: found, read, changed, checked, and written back."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowres_ft import registry, yaml12
from lowres_ft.errors import RecipeError
from lowres_ft.recipe import Recipe, load_recipe, parse
from lowres_ft.spec import Spec

FULL: dict[str, Any] = {
    **load_recipe("sentiment-lora").model_dump(mode="json"),
    "train": load_recipe("sentiment-lora", ["train.early_stopping.patience=3"]).train.model_dump(mode="json"),
}
"""Every key of a recipe, optional parts included."""


def fails(*overrides: str, name: str | Path = "sentiment-lora") -> dict[str, str]:
    """The problems that overrides make, by path."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    return problems(caught.value)


def problems(error: RecipeError) -> dict[str, str]:
    head, *lines = error.message.split("\n  ")
    assert head.endswith(f": {len(lines)} problem{'s' if len(lines) > 1 else ''}")
    assert error.hint
    found = dict(line.split(": ", 1) for line in lines)
    assert len(found) == len(lines)
    return found


# Writing and reading back

TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
LABELS = st.lists(
    TEXTS.filter(str.strip)
    | st.sampled_from(["no", "1e3", "null", "007", "~", "true", "a\nb", "🙂", "<<", "=", "---"]),
    min_size=2,
    max_size=5,
    unique=True,
)


@given(labels=LABELS, summary=TEXTS, base=TEXTS, rate=st.floats(1e-30, 1e30), share=st.floats(0.01, 0.99) | TEXTS)
def test_every_recipe_comes_back_equal(labels, summary, base, rate, share):
    values = copy.deepcopy(FULL) | {"summary": summary}
    values["task"]["labels"] = labels
    values["model"]["base"] = base
    values["train"]["learning_rate"] = rate
    values["data"]["test"] = share
    values["data"]["columns"] = {"text": labels[0], "label": summary}
    recipe = parse(values)
    assert recipe.task.labels == tuple(labels)
    assert parse(yaml12.loads(recipe.to_yaml(), where="copy")) == recipe


@given(
    batch=st.integers(1, 1 << 40), decay=st.floats(0, 1e9), steps=st.none() | st.integers(1, 99), fused=st.booleans()
)
def test_overrides_say_what_they_say(batch, decay, steps, fused):
    overrides = [f"train.batch_size={batch}", f"train.weight_decay={decay!r}", f"method.rslora={str(fused).lower()}"]
    recipe = load_recipe("sentiment-lora", [*overrides, f"train.steps={'' if steps is None else steps}"])
    found = recipe.train.batch_size, recipe.train.weight_decay, recipe.train.steps, recipe.method.rslora
    assert found == (batch, decay, steps, fused)


def test_what_needs_validation_is_refused_without():
    with pytest.raises(RecipeError) as caught:
        load_recipe("sentiment-lora", ["data.validation=null", "train.early_stopping={}", "train.evaluate_every=5"])
    for key in ("early_stopping", "evaluate_every"):
        assert f"train.{key}: needs rows to evaluate on" in caught.value.message


def test_labels_keep_their_spelling():
    task = load_recipe("sentiment-lora", ["task.labels=[no, 'null', '1e3', Very Good]"]).task
    assert task.labels == ("no", "null", "1e3", "Very Good")


# Overrides


@pytest.mark.parametrize(
    "value", ["*.csv", "a#b.csv", "C:\\x\\y.csv", "hub:a/b@c/d:e", "rows=1.csv", "a: b", "[ab]*.csv", "~/x.csv", "-"]
)
def test_a_source_is_taken_as_it_was_typed(value):
    assert load_recipe("sentiment-lora", [f"data.train={value}"]).data.train == value


def test_values_may_be_lists_mappings_and_quoted_text():
    overrides = [
        "method.targets=[query, 'value']",
        "data.columns={text: review}",
        "data.validation='0.5'",
        "data.test=",
    ]
    recipe = load_recipe("sentiment-lora", overrides)
    assert recipe.method.targets == ("query", "value")
    assert recipe.data.columns == {"text": "review"}
    assert (recipe.data.validation, recipe.data.test) == ("0.5", None)


def test_the_last_of_two_overrides_counts():
    assert load_recipe("sentiment-lora", ["train.epochs=3", "train.epochs=4"]).train.epochs == 4


def test_an_optional_part_is_made_by_a_key_below_it():
    assert load_recipe("sentiment-lora", ["train.early_stopping.patience=5"]).train.early_stopping.patience == 5


def test_a_whole_part_and_a_key_below_it_in_any_order():
    overrides = ["data.columns.label=stars", "data.columns={text: review}"]
    for order in (overrides, overrides[::-1]):
        assert load_recipe("sentiment-lora", order).data.columns == {"text": "review", "label": "stars"}


def test_a_column_may_be_named_by_its_number():
    recipe = load_recipe("sentiment-lora", ["data.columns={text: 1}", "data.columns.label=4"])
    assert recipe.data.columns == {"text": "1", "label": "4"}
    assert parse(yaml12.loads(recipe.to_yaml(), where="x")).data.columns == {"text": "1", "label": "4"}


def test_values_given_are_left_alone():
    values = copy.deepcopy(FULL)
    parse(values, ["train.epochs=9", "method.kind=full"])
    assert values == FULL


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_change_of_kind_starts_from_the_new_defaults(order):
    overrides = ["method.kind=lora", "method.alpha=5"]
    recipe = load_recipe("sentiment-full", [overrides[index] for index in order])
    assert recipe.method == registry.load("methods", "lora")(alpha=5.0)
    assert recipe.notes == ()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_a_change_of_kind_tells_what_it_drops(order):
    overrides = ["method.kind=head", "train.epochs=1", "model.quantize=int8"]
    recipe = load_recipe("sentiment-lora", [overrides[index] for index in order])
    assert recipe.method == registry.load("methods", "head")()
    assert recipe.notes == (
        "method.kind=head starts from that kind's defaults; dropped: rank=16, targets='all-linear'",
    )
    assert recipe.to_yaml() == load_recipe(
        "sentiment-lora-int8", [*overrides, "name=sentiment-lora"]
    ).to_yaml().replace(
        "The same with the base held in 8 bits, for bases that would not fit otherwise.", recipe.summary
    )


def test_the_same_kind_again_drops_nothing():
    recipe = load_recipe("sentiment-lora", ["method.kind=lora"])
    assert recipe == load_recipe("sentiment-lora")


def test_a_key_of_the_kind_that_went_is_unknown_to_the_new_one():
    assert fails("method.rank=4", "method.kind=head") == {"method.rank": "is not a key here; there is kind"}


# Problems


def keys(spec: type[Spec], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key below a spec, by walking the models; the plug-ins are those of `FULL`."""
    for name, field in spec.model_fields.items():
        if field.exclude:
            continue
        yield (*path, name)
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
        if not path and name in ("task", "method"):
            inner = [registry.load(f"{name}s", FULL[name]["kind"])]
        for kind in inner:
            if isinstance(kind, type) and issubclass(kind, Spec):
                yield from keys(kind, (*path, name))


ALL_KEYS = list(keys(Recipe))


def typos(key: str) -> set[str]:
    swapped = key[:-2] + key[-1] + key[-2]
    return {key[:1] + key[2:], key + "s", swapped, key.replace("_", "-"), key.capitalize()} - {key}


def test_every_key_was_found():
    assert len(ALL_KEYS) == len(set(ALL_KEYS)) >= 39


@pytest.mark.parametrize("path", ALL_KEYS, ids=".".join)
def test_a_typo_in_any_key_is_one_problem_that_names_its_neighbour(path):
    *parents, key = path
    for typo in typos(key):
        values = copy.deepcopy(FULL)
        place = values
        for parent in parents:
            place = place[parent]
        place[typo] = place.pop(key)
        with pytest.raises(RecipeError) as caught:
            parse(values)
        dotted = ".".join([*parents, typo])
        assert problems(caught.value) == {dotted: f"is not a key here (did you mean '{key}'?)"}


@pytest.mark.parametrize("path", [path for path in ALL_KEYS if len(path) > 1], ids=".".join)
def test_an_unknown_key_below_any_value_is_told(path):
    dotted = ".".join(path)
    found = fails(f"{dotted}.x.y=1")
    assert len(found) == 1
    assert next(iter(found)).startswith(dotted)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("method.rank=0", "method.rank: must be at least 1, found 0"),
        ("train.learning_rate=fast", "train.learning_rate: must be a number, found 'fast'"),
        ("train.learning_rate=0", "train.learning_rate: must be greater than 0, found 0"),
        ("train.learning_rate=.nan", "train.learning_rate: must be a finite number, found NaN"),
        ("train.learning_rate=1e999", "train.learning_rate: must be a finite number, found Infinity"),
        ("train.learning_rate=true", "train.learning_rate: must be a number, found true"),
        ("train.epochs=true", "train.epochs: must be a whole number, found true"),
        ("train.epochs=2.5", "train.epochs: must be a whole number, found 2.5"),
        ("train.epochs=2.0", "train.epochs: must be a whole number, found 2.0"),
        ("train.seed=-1", "train.seed: must be at least 0, found -1"),
        ("train.schedule=linaer", "train.schedule: must be 'linear', 'cosine' or 'constant', found 'linaer'"),
        ("train.early_stopping=true", "train.early_stopping: must be a mapping, found true"),
        ("train.early_stopping.patience=0", "train.early_stopping.patience: must be at least 1, found 0"),
        ("method.rslora=1", "method.rslora: must be true or false, found 1"),
        ("method.rslora=yes", "method.rslora: must be true or false, found 'yes'"),
        ("method.targets=[]", "method.targets: must be 'all-linear' or 'attention' or non-empty, found []"),
        (
            "method.kind=lroa",
            "method.kind: must be one of dora, full, head, ia3, lora, found 'lroa' (did you mean 'lora'?)",
        ),
        ("method.kind=", "method.kind: must be one of dora, full, head, ia3, lora, found null"),
        ("task.kind=[a]", 'task.kind: must be one of chat, classification, ner, found ["a"]'),
        ("task.labels=positive", "task.labels: must be a list, found 'positive'"),
        ("task.labels=[positive]", 'task.labels: must name at least two classes, found ["positive"]'),
        ("task.labels=[a, a]", 'task.labels: must not name a class twice, found ["a", "a"]'),
        ("task.max_length=64k", "task.max_length: must be a whole number, found '64k'"),
        ("model.base=", "model.base: must be text, found null"),
        ("model.base=''", "model.base: must be non-empty, found ''"),
        ("model.quantize=int4", "model.quantize: must be 'none', 'int8' or 'nf4', found 'int4'"),
        ("data.validation=1", "data.validation: must be less than 1 or text, found 1"),
        ("data.validation=true", "data.validation: must be a number or text, found true"),
        ("data.columns=review", "data.columns: must be a mapping, found 'review'"),
        ("data.columns.text=3.5", "data.columns.text: must be text, found 3.5"),
        ("data.columns.text=true", "data.columns.text: must be text, found true"),
        ("data.columns.txt=review", "data.columns.txt: is no role; the roles are text, label (did you mean 'text'?)"),
        ("data.columns.3=review", "data.columns.3: is no role; the roles are text, label"),
        ("data=reviews.csv", "data: must be a mapping, found 'reviews.csv'"),
        ("data=[1]", "data: must be a mapping, found [1]"),
        ("train=", "train: must be a mapping, found null"),
        ("method=lora", "method: must be a mapping with a kind (dora, full, head, ia3, lora), found 'lora'"),
        ("method=", "method.kind: is missing; it is one of dora, full, head, ia3, lora"),
        ("name=3", "name: must be text, found 3"),
        ("summary=[]", "summary: must be text, found []"),
        (
            "name=../x",
            "name: must begin with a letter or a digit and hold only letters, digits, '.', '_' and '-', found '../x'",
        ),
        ("train.epochs.x=1", "train.epochs.x: cannot be set: train.epochs has no keys, it is 2"),
        ("task.labels.0=bad", 'task.labels.0: cannot be set: task.labels has no keys, it is ["negative", "positive"]'),
        ("modle.base=x", "modle: is not a key here (did you mean 'model'?)"),
        ("notes=[x]", "notes: is not a key here; there are name, summary, task, method, model, data, train, budget"),
        ("data.train=x\udce9.csv", "data.train: is not UTF-8 text"),
        ("train.=1", "train.=1: is not KEY=VALUE; for example train.epochs=1"),
        ("train.epochs", "train.epochs: is not KEY=VALUE; for example train.epochs=1"),
        ("=1", "=1: is not KEY=VALUE; for example train.epochs=1"),
    ],
)
def test_a_wrong_value_is_one_problem_with_path_and_value(override, problem):
    assert [": ".join(item) for item in fails(override).items()] == [problem]


def test_every_problem_is_told_at_once(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "nmae: mine\ntask: {kind: clasification}\nmodel: {base: 3, drop: 1}\nmethod: {knd: lora, rank: 3}\n"
        "data: {validation: 2, columns: {txt: a}}\ntrain: {learning_rate: fast, epochs: 0}\nextra: 1\n"
    )
    found = fails("train.warmup=1", "foo", name=tmp_path / "mine.yaml")
    assert sorted(found) == sorted(
        [
            *("nmae", "task.kind", "model.base", "model.drop", "method.knd", "data.train", "data.validation"),
            *("train.learning_rate", "train.epochs", "train.warmup", "extra", "foo"),
        ]
    )


def test_an_empty_recipe_tells_what_is_needed(tmp_path):
    (tmp_path / "mine.yaml").write_text("{}")
    found = fails(name=tmp_path / "mine.yaml")
    assert found == {
        "name": "is missing",
        "task.kind": "is missing; it is one of chat, classification, ner",
        "method.kind": "is missing; it is one of dora, full, head, ia3, lora",
        "model.base": "is missing",
        "data.train": "is missing",
    }


def test_a_method_that_cannot_work_on_the_base_is_refused_by_name():
    assert fails("model.quantize=int8", name="sentiment-full") == {
        "method.kind": "full trains every weight, and int8 weights cannot be trained; use model.quantize=none or lora"
    }
