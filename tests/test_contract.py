"""Every task with every method on every storage of a base: it works, or is refused by name before a weight is read."""

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from lowres_ft import evaluate, model, registry
from lowres_ft.errors import ModelError, RecipeError
from lowres_ft.parts import ModelSpec
from lowres_ft.pipeline import run
from lowres_ft.preparing import rehearse
from lowres_ft.recipe import load_recipe, parse, shipped
from lowres_ft.train import train
from tests.conftest import prepare

Bases = Callable[..., Path]
ARCHITECTURES: dict[str, dict[str, int]] = {  # as wide as nf4's blocks
    "bert": {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 128},
    "gpt2": {"n_embd": 64},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
}
METHODS = [
    *({"kind": kind} for kind in registry.names("methods")),
    {"kind": "lora", "init": "pissa"},
    {"kind": "lora", "init": "loftq"},
    {"kind": "lora", "rslora": True, "dropout": 0.1, "rate_ratio": 4.0},
]
STORAGES = get_args(ModelSpec.model_fields["quantize"].annotation)
TAGGED = [
    {"words": "the film was in London today".split(), "tags": "O O O O B-LOC O".split()},
    {"words": "Ann saw a good film".split(), "tags": "B-PER O O O O".split()},
]
TASKS: dict[str, dict[str, Any]] = {
    "classification": {"labels": ["bad", "good"], "max_length": 32},
    "ner": {"max_length": 32, "overlap": 8},
    "chat": {"max_length": 96, "max_new_tokens": 4, "samples": 1},
}


@pytest.fixture(scope="module")
def sources(reviews: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Rows for each task of `TASKS`."""
    tagged = tmp_path_factory.mktemp("contract") / "tagged.jsonl"
    rows = [row | {"words": [*row["words"], f"number{number}"], "tags": [*row["tags"], "O"]}
            for number, row in enumerate(TAGGED * 15)]  # fmt: skip
    tagged.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"classification": reviews, "ner": tagged, "chat": chats}


def refused(task: str, method: dict[str, Any], storage: str, architecture: str) -> bool:
    """What cannot be."""
    kind, init = method["kind"], method.get("init")
    return (
        (kind == "full" and storage != "none")
        or (init == "pissa" and storage != "none")
        or (init == "loftq" and storage == "none")
        or (task == "chat" and (kind == "head" or architecture == "bert"))
    )


def test_the_contract_covers_all_there_is():
    assert set(TASKS) == set(registry.names("tasks"))
    assert {method["kind"] for method in METHODS} == set(registry.names("methods"))
    assert (len(METHODS), STORAGES) == (8, ("none", "int8", "nf4"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("task", TASKS)
def test_every_combination_works_or_is_refused(
    task: str,
    architecture: str,
    bases: Bases,
    chat_bases: Bases,
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    makes = chat_bases if task == "chat" and architecture != "bert" else bases
    base, outcomes = makes(architecture, **ARCHITECTURES[architecture]), Counter[bool]()
    for number, (method, storage) in enumerate(itertools.product(METHODS, STORAGES)):
        raw = {
            "name": "contract",
            "task": {"kind": task, **TASKS[task]} | ({"template": "plain"} if task == "chat" else {}),
            "model": {"base": str(base), "dtype": "float32", "quantize": storage},
            "method": method,
            "data": {"train": str(sources[task]), "probe_rows": 2},
            "train": {"steps": 2, "batch_size": 4, "learning_rate": 0.01},
        }
        wrong = refused(task, method, storage, architecture)
        outcomes[wrong] += 1
        if wrong:
            with monkeypatch.context() as patch:
                patch.setattr(model, "load", None)
                with pytest.raises((RecipeError, ModelError)) as caught:
                    rehearse(parse(raw), device_name="cpu")
            words = {method["kind"], method.get("init"), storage, "bert"} - {None, "none"}
            assert any(str(word) in caught.value.message for word in words), caught.value.message
        else:
            learns(raw, tmp_path / str(number))
    assert sum(outcomes.values()) == 24
    assert outcomes[True] == {"chat": {"bert": 24}.get(architecture, 8)}.get(task, 5)


def learns(raw: dict[str, Any], work: Path) -> None:
    """Train two steps; outputs are finite, and what is trained has moved."""
    ready = prepare(parse(raw), work)
    before = {name: tensor.clone() for name, tensor in ready.adapted.tensors().items()}
    losses = [step.loss for step in train(ready.start(), ready.tokens["train"], ready.plan, ready.machine)]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    after = ready.adapted.tensors()
    assert any(not torch.equal(before[name], after[name]) for name in before), raw
    found = evaluate.outputs(ready.adapted, ready.tokens["validation"], ready.plan)
    assert np.isfinite(found.values).all()


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_recipe_runs_on_a_tiny_base(
    name: str, bases: Bases, chat_bases: Bases, sources: dict[str, Path], tmp_path: Path
):
    """Two steps, on the rows of the contract: no recipe of the folder is left out."""
    task = load_recipe(name).task.kind
    base = chat_bases("llama", **ARCHITECTURES["llama"]) if task == "chat" else bases("bert")
    changes = [f"model.base={base}", f"data.train={sources[task]}", "data.validation=0.2", "data.test=0.2"]
    changes += [
        "train.steps=2",
        "train.batch_size=4",
        *(f"task.{key}={json.dumps(value)}" for key, value in TASKS[task].items()),
    ]
    if task == "chat":
        changes.append("task.control=null")
    bundle = run(load_recipe(name, changes), tmp_path / "bundle", device_name="cpu")
    assert json.loads((bundle.folder / "report.json").read_text())["measured"]["steps"] == 2
