"""What all tests share: an empty cache of their own, and a runner of recipes on tiny bases."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowres_ft.bundle import Bundle
from lowres_ft.pipeline import run
from lowres_ft.recipe import Recipe, parse
from tests import tiny

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """Nothing that a test does reaches the user's cache, but for tests of the starter assets themselves."""
    if "assets" not in request.keywords:
        monkeypatch.setenv("LOWRES_FT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a tiny base of an architecture, once for each."""
    made: dict[str, Path] = {}

    def make(architecture: str = "bert", **changes: object) -> Path:
        key = f"{architecture}{sorted(changes.items())}"
        if key not in made:
            made[key] = tiny.base(tmp_path_factory.mktemp(architecture), architecture, **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small labelled CSV."""
    return tiny.reviews(tmp_path_factory.mktemp("data") / "reviews.csv")


def recipe(base: Path, data: Path, *overrides: str) -> Recipe:
    """A recipe on a tiny base: two steps of LoRA in fp32, unless overridden."""
    raw = {
        "name": "tiny",
        "task": {"kind": "classification", "labels": ["bad", "good"], "max_length": 32},
        "model": {"base": str(base), "dtype": "float32"},
        "method": {"kind": "lora", "rank": 4},
        "data": {"train": str(data), "probe_rows": 4},
        "train": {"steps": 2, "batch_size": 8, "learning_rate": 0.01},
    }
    return parse(raw, overrides)


@pytest.fixture
def trained(bases: Callable[..., Path], reviews: Path, tmp_path: Path) -> Callable[..., Bundle]:
    """Run a recipe on a tiny base and return its bundle."""

    def train(architecture: str = "bert", *overrides: str, out: str = "bundle") -> Bundle:
        return run(recipe(bases(architecture), reviews, *overrides), tmp_path / out, device_name="cpu")

    return train
