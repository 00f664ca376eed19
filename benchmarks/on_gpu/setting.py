"""What all ways to train a shape share: recipe, profile, random rows and random weights."""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.job import Clock
from benchmarks.on_gpu.cells import RANK, SHAPES, Job
from lowres_ft import profiles
from lowres_ft.bases import Base
from lowres_ft.batches import Tokens, steps
from lowres_ft.profiles import Profile
from lowres_ft.recipe import Recipe, parse
from lowres_ft.tasks.base import IGNORED

_SPREAD = 0.02  # of weights, as transformers begins with
_CLASSES = ("no", "yes")

Held = Callable[[str, Tensor], nn.Parameter]
"""The parameter of that name that holds a random weight."""


@dataclass(frozen=True)
class Ready:
    """A contender before its first step."""

    run: Callable[[Clock], list[float]]
    """Train to the end, telling the clock of each step; the loss of each step, where it is known."""
    trainable_parameters: int
    plan: dict[str, Any] | None = None
    """How our library runs."""
    copied: Callable[[], int] | None = None
    """Bytes of layers that were copied so far, where they pass."""


@dataclass(frozen=True)
class Setting:
    """A job, and what is known of its model before there is one."""

    job: Job
    recipe: Recipe
    base: Base
    profile: Profile

    @property
    def steps(self) -> int:
        """All of them, the untimed ones too."""
        return self.job.warmup + self.job.steps


def setting(job: Job, folder: Path) -> Setting:
    """Write the model's config into a folder and look at it as at any base."""
    (folder / "config.json").write_text(json.dumps(job.config), encoding="utf-8")
    generates = SHAPES[job.shape].generates
    task = {"kind": "chat"} if generates else {"kind": "classification", "labels": list(_CLASSES)}
    quantize = "none" if job.numbers == "bf16" else job.numbers
    raw = {
        "name": job.shape,
        "task": task | {"max_length": job.row},
        "model": {
            "base": str(folder),
            "dtype": "bfloat16",
            "quantize": quantize,
            "quantize_embeddings": job.way.embeddings,
        },
        "method": {"kind": "lora", "rank": RANK},
        "data": {"train": "random.jsonl"},
        "train": {
            "steps": job.warmup + job.steps,
            "batch_size": job.rows,
            "schedule": "constant",
            "warmup": 0.0,
            "seed": job.seed,
        },
    }
    recipe = parse(raw, [])
    base = Base(str(folder), folder, str(folder))
    return Setting(job, recipe, base, profiles.profile(base, recipe.task))


def tokens(found: Setting) -> Tokens:
    """Rows of random ids, as many as the steps take; a classifier's have a random class each."""
    job = found.job
    random = np.random.default_rng(job.seed)
    rows = job.rows * found.steps
    ids = random.integers(1, found.profile.vocabulary, (rows, job.row), dtype=np.int32)
    if SHAPES[job.shape].generates:
        targets = np.full_like(ids, IGNORED)
        targets[:, job.row // 2 - 1 : -1] = ids[:, job.row // 2 :]
    else:
        targets = random.integers(0, len(_CLASSES), (rows, 1), dtype=np.int32)
    firsts = np.arange(rows + 1)
    return Tokens(ids.ravel(), firsts * ids.shape[1], targets.ravel(), firsts * targets.shape[1], firsts)


def in_order(found: Setting, rows: Tokens) -> np.ndarray:
    """(rows,) the order in which our loop takes them, for all to take the same."""
    spec = found.recipe.train
    return np.concatenate(list(islice(steps(rows, spec.batch_size, spec.seed), found.steps)))


def empty_model(found: Setting, attention: str = "sdpa") -> PreTrainedModel:
    """The model with its buffers, and with parameters that take no memory."""
    config = profiles.config(found.base, found.recipe.task)
    config.pad_token_id = 0
    with init_empty_weights(include_buffers=False), profiles.quiet():
        model: PreTrainedModel = profiles.auto_class(found.recipe.task).from_config(
            config, attn_implementation=attention
        )
    return model


def fill(model: PreTrainedModel, device: str, held: Held) -> None:
    """Give a model weights that follow from their names, one at a time; the model is never whole in 16 bits."""
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in made:
            made[id(parameter)] = held(name, _random(name, parameter.shape, device))
        _put(model, name, made[id(parameter)])
    for name, buffer in list(model.named_buffers()):
        _put(model, name, buffer.to(device))


def _put(model: PreTrainedModel, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)


def _random(name: str, shape: torch.Size, device: str) -> Tensor:
    """In bf16; a norm's weights are 1, biases 0."""
    if len(shape) == 1:
        value = float(name.endswith("weight"))
        return torch.full(shape, value, device=device, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).mul_(_SPREAD)
