"""Rows, tokens and facts of a work, written once for all contenders: `python -m benchmarks.prepare WORK FOLDER`."""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Iterable
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import flops, works
from benchmarks.works import SEED, Work
from lowres_ft import bases, data, device
from lowres_ft.data import Rows
from lowres_ft.pipeline import run
from lowres_ft.recipe import Recipe, load_recipe
from lowres_ft.tasks.base import IGNORED, Task
from lowres_ft.tokenizing import load_tokenizer

_PEERS = ("accelerate", "datasets", "trl")
_ADAPTER_STEPS = 8  # of the adapter that predicts: enough for probabilities that an error would move


def prepare(work: Work, folder: Path, device_name: str) -> None:
    """Write what all contenders share into `folder`."""
    recipe = load_recipe(work.recipe, [*work.overrides, f"train.seed={SEED}"])
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as scratch:
        found = data.load(recipe, Path(scratch))
        assert found.test is not None
        chosen = found.train.take(np.arange(work.rows))
        order = np.random.default_rng(SEED).permutation(len(found.test))  # a split may stand in the order of its labels
        held = found.test.take(order[: work.held_out])
        write_rows(chosen, found.task, folder / "rows.jsonl")
        base = bases.resolve(recipe.model)
        tokens = {
            name: _encoded(rows, found.task, base.folder) for name, rows in (("rows", chosen), ("held_out", held))
        }
    (folder / "tokens.json").write_text(json.dumps(tokens), encoding="utf-8")
    resolved = recipe.model_copy(update={"task": found.task})
    if work.predicts:
        _train_adapter(work, folder, device_name)
    facts = {
        "base": str(base.folder),
        "labels": list(found.task.names),
        "chats": found.task.generates,
        "max_length": found.task.max_length,
        "learning_rate": recipe.train.learning_rate,
        "weight_decay": recipe.train.weight_decay,
        "clip": recipe.train.clip,
        "rank": getattr(recipe.method, "rank", None),
        "alpha": getattr(recipe.method, "alpha", None),
        **_counts(tokens["rows"]),
        "flops_per_token": _flops(resolved, tokens["rows"], work),
        "machine": machine(device_name),
        "versions": device.versions() | dict(_versions(_PEERS)),
    }
    (folder / "prepared.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def write_rows(rows: Rows, task: Task, path: Path) -> None:
    """Write rows as JSON lines that a recipe reads back."""
    with open(path, "w", encoding="utf-8") as sink:
        for example in rows.examples(task):
            values = {field.name: getattr(example, field.name) for field in fields(example) if field.name != "where"}
            sink.write(json.dumps({key: value for key, value in values.items() if value is not None}) + "\n")


def _encoded(rows: Rows, task: Task, base: Path) -> list[tuple[list[int], list[Any]]]:
    """Ids and targets of each row, as our library makes them; every row must give one sequence."""
    tokenizer = load_tokenizer(base)
    task.prepare(tokenizer)
    return [(one.ids, list(one.targets)) for (one,) in task.encode(tokenizer, list(rows.examples(task)))]


def _counts(sequences: list[tuple[list[int], list[Any]]]) -> dict[str, float]:
    lengths = [len(ids) for ids, _ in sequences]
    items = sum(target != IGNORED for _, targets in sequences for target in targets)
    return {
        "rows": len(lengths),
        "tokens": sum(lengths),
        "longest": max(lengths),
        "mean_tokens": sum(lengths) / len(lengths),
        "items": items,
    }


def _flops(recipe: Recipe, sequences: list[tuple[list[int], list[Any]]], work: Work) -> float:
    """Useful FLOPs of a real token, on the average over all rows."""
    cost = flops.cost(recipe)
    total = 0.0
    for ids, targets in sequences:
        supervised = sum(target != IGNORED for target in targets)
        total += cost.forward(len(ids), supervised)
        total += 0 if work.predicts else cost.backward(len(ids), supervised)
    return total / sum(len(ids) for ids, _ in sequences)


def _train_adapter(work: Work, folder: Path, device_name: str) -> None:
    """Train the adapter that all contenders predict with."""
    changes = ["data.validation=null", "data.test=null", f"train.steps={_ADAPTER_STEPS}", f"train.seed={SEED}"]
    changes += [f"data.train={folder / 'rows.jsonl'}"]
    run(load_recipe(work.recipe, [*work.overrides, *changes]), folder / "adapter", device_name=device_name)


def machine(device_name: str) -> dict[str, Any]:
    """What the figures were measured on."""
    found = device.find(device_name)
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return {
        "device": found.device,
        "name": found.name,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": found.threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "capabilities": {name: value for name, value in has.items() if isinstance(value, bool | int | str)},
    }


def _versions(packages: Iterable[str]) -> Iterable[tuple[str, str]]:
    for package in packages:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("work")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    prepare(works.chosen(given.work, quick=given.quick), given.folder, given.device)
