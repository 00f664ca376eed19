"""What all tests share: an empty cache of their own, and a runner of recipes on tiny bases."""

import gc
import io
import os
import shutil
import signal
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # read as huggingface_hub is imported
os.environ["OMP_NUM_THREADS"] = "1"  # also of the processes that tests start: each core has a worker
import lowres_ft  # noqa: F401, I001 (first, as it sets what PyTorch reads when it is imported)

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import matplotlib.backends.backend_svg  # noqa: F401 (runs here then draw their reports without a child)
import pytest
import torch

from lowres_ft import bases as base_module
from lowres_ft import batches, behaviour, data, device, model, profiles, speed, timings, train
from lowres_ft import plan as plans
from lowres_ft.batches import Tokens
from lowres_ft.bundle import Bundle, open_bundle
from lowres_ft.cli.main import main
from lowres_ft.device import Machine
from lowres_ft.model import Adapted
from lowres_ft.pipeline import run
from lowres_ft.plan import Plan
from lowres_ft.recipe import Recipe, parse
from lowres_ft.train import TrainState
from tests import tiny, tiny_chat

Command = Callable[..., tuple[int, str, str]]
USERS_CACHE = os.environ.get("LOWRES_FT_CACHE")

torch.set_num_threads(1)
torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that tests and their fixtures do reaches the user's cache, but for tests of the starter assets.

    It holds rates of this machine, made up: beside other tests they would be measured in each process anew.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRES_FT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        rates = {"flops": {"float32": 1e11, "bfloat16": 2e11}, "bandwidth": 1e11, "link": 1e9}
        timings.once(device.find("cpu"), "", speed.kept_as("cpu"), lambda: rates)
        yield


@pytest.fixture(scope="session", autouse=True)
def kept_libraries() -> None:
    """What was imported is not looked through again each time that a run drops its garbage."""
    gc.collect()
    gc.freeze()


@contextmanager
def users_cache() -> Iterator[None]:
    """Within, starter assets are fetched as users do, and kept for the next time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LOWRES_FT_CACHE")
        if USERS_CACHE is not None:
            patch.setenv("LOWRES_FT_CACHE", USERS_CACHE)
        yield


@pytest.fixture(autouse=True)
def assets_cache(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests of the starter assets use the user's cache."""
    with users_cache() if "assets" in request.keywords else nullcontext():
        yield


def _maker(factory: pytest.TempPathFactory, base: Callable[..., Path], usual: str) -> Callable[..., Path]:
    """What makes a base of an architecture, `usual` where none is named, once for each."""
    made: dict[str, Path] = {}

    def make(architecture: str = usual, **changes: object) -> Path:
        key = f"{architecture}{sorted(changes.items())}"
        if key not in made:
            made[key] = base(factory.mktemp(architecture), architecture, **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a tiny base of an architecture, once for each."""
    return _maker(tmp_path_factory, tiny.base, "bert")


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small labelled CSV."""
    return tiny.reviews(tmp_path_factory.mktemp("data") / "reviews.csv")


@pytest.fixture(scope="session")
def chat_bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a tiny chat base of an architecture, once for each."""
    return _maker(tmp_path_factory, tiny_chat.base, "llama")


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short conversations in JSONL."""
    return tiny_chat.chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


@pytest.fixture(scope="session")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CSV of texts with any of three labels."""
    return tiny.topics(tmp_path_factory.mktemp("data") / "topics.csv", ("cold", "good", "long"))


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


@dataclass
class Prepared:
    """A recipe that is ready to train."""

    recipe: Recipe
    adapted: Adapted
    tokens: dict[str, Tokens]
    plan: Plan
    machine: Machine

    def start(self) -> TrainState:
        return train.start(self.recipe, self.adapted, self.tokens["train"], self.plan)


def prepare(recipe: Recipe, work: Path, device_name: str = "cpu", **plan_changes: object) -> Prepared:
    """Do what a run does before its first step."""
    work.mkdir(exist_ok=True)
    machine = device.find(device_name)
    rows = data.load(recipe, work)
    resolved = recipe.model_copy(update={"task": rows.task})
    base = base_module.resolve(recipe.model)
    profile = profiles.profile(base, rows.task)
    plan = plans.make(resolved, profile, machine).model_copy(update=plan_changes)
    adapted = model.load(resolved, base, profile, plan)
    plan, _ = behaviour.revise(adapted, plan)
    tokens = {name: batches.tokenize(adapted, split, work / name) for name, split in rows.splits().items()}
    return Prepared(resolved, adapted, tokens, plan, machine)


@pytest.fixture(scope="session")
def bundles(bases: Callable[..., Path], reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run a recipe on a tiny base, once for each; its bundle is for copies, not to be changed."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*wanted: str) -> Path:
        if wanted not in made:
            architecture, *overrides = wanted
            out = tmp_path_factory.mktemp("bundles") / "bundle"
            made[wanted] = run(recipe(bases(architecture), reviews, *overrides), out, device_name="cpu").folder
        return made[wanted]

    return make


@pytest.fixture
def trained(bundles: Callable[..., Path], tmp_path: Path) -> Callable[..., Bundle]:
    """Make a bundle of a recipe on a tiny base, which is the test's own; equal recipes are trained once."""

    def train(architecture: str = "bert", *overrides: str, out: str = "bundle") -> Bundle:
        return open_bundle(shutil.copytree(bundles(architecture, *overrides), tmp_path / out))

    return train


@pytest.fixture
def lowres(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call the command line; return its exit code, standard output and standard error."""

    def call(*arguments: object, typed: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lowres-ft", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return code, *capfd.readouterr()

    return call
