"""What any run takes at least: told before heavy libraries are imported, and never more than an account tells."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lowres_ft import bases as base_module
from lowres_ft import budget, device, least, limits, profiles, tables
from lowres_ft import plan as plans
from lowres_ft.errors import ModelError
from lowres_ft.headers import Outline
from lowres_ft.recipe import load_recipe
from tests import conftest, tiny

HEAVY = ("torch", "transformers", "numpy", "peft")
INT8, WORDS = "model.quantize=int8", "model.quantize_embeddings=true"
RESIDENT = "budget.offload=none"
R1 = "method.rank=1"


def command(*arguments: str) -> tuple[int, str, list[str]]:
    """The exit code of a command, what it says, and which heavy libraries it has imported."""
    code = (
        "import atexit, json, sys; from lowres_ft.cli.main import main;"
        f"atexit.register(lambda: print(json.dumps([name for name in {HEAVY} if name in sys.modules])));"
        "sys.argv[0] = 'lowres-ft'; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr, json.loads(done.stdout.splitlines()[-1])


def base(folder: Path, **tensors: tuple[int, ...]) -> Path:
    """A base of which nothing but headers is there."""
    header = {name.replace("__", "."): {"dtype": "F32", "shape": shape} for name, shape in tensors.items()}
    written = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    (folder / "model.safetensors").write_bytes(len(written).to_bytes(8, "little") + written)
    return folder


@pytest.mark.parametrize("name", ["recipe", "curve", "plan"])
def test_a_bound_below_what_libraries_take_is_refused_before_they_are_imported(name):
    code, told, imported = command(name, "sentiment-lora", "budget.memory=300MiB")
    assert code == 2
    assert told.startswith("error: budget.memory: 300 MiB are less than the ")
    assert "hint: Give it more" in told
    assert imported == []


@pytest.mark.parametrize("name", ["recipe", "curve"])
def test_a_bound_below_what_weights_take_is_refused_too(name, tmp_path):
    model = base(tmp_path, embed__weight=(150_000, 4096), layers__0__mlp__weight=(4096, 4096))
    overrides = (f"model.base={model}", "model.dtype=bfloat16", INT8, "budget.memory=2GiB")
    code, told, imported = command(name, "sentiment-lora", *overrides)
    assert code == 2
    assert "error: this run needs 4.1 GiB at least, and may take 2.0 GiB: libraries take " in told
    assert "model.quantize_embeddings=true saves 615 MiB; " in told
    assert ". Use a smaller base, or give it more. `lowres-ft plan` tells " in told
    assert imported == []


def test_the_libraries_are_those_of_the_device(monkeypatch):
    fitted = tables.read("memory")
    assert least.libraries("cpu") == fitted["bound"]["libraries"]
    fitted["cuda"]["libraries"] = least.libraries("cpu") - 1
    monkeypatch.setattr(tables, "read", lambda _: fitted)
    monkeypatch.setattr(least, "_may_have_gpu", lambda: True)
    assert least.libraries("auto") == min(least.libraries("cpu"), least.libraries("cuda:1")) < least.libraries("cpu")
    monkeypatch.setattr(least, "_may_have_gpu", lambda: False)
    assert least.libraries("auto") == least.libraries("cpu")
    least.require_libraries(load_recipe("sentiment-lora", [f"budget.memory={least.libraries('cpu')}B"]), "cpu")
    least.require(load_recipe("sentiment-lora", ["budget.memory=auto"]), "cpu")
    with pytest.raises(ModelError, match="libraries alone take"):
        least.require(load_recipe("sentiment-lora", [f"budget.memory={least.libraries('cpu') - 1}B"]), "cpu")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param((R1,), 2 * (1000 + 4800) + 20 * 780, id="words, two layers, and what an adapter trains"),
        pytest.param((), 2 * (1000 + 4800) + 20 * 16 * 780, id="rank 16"),
        pytest.param(
            (R1, "data.validation=null"), 2 * (1000 + 4800) + 16 * 780, id="rank 1, of which no best step is kept"
        ),
        pytest.param((R1, RESIDENT), 2 * (1000 + 7200 + 120) + 20 * 780, id="layers stay"),
        pytest.param((R1, RESIDENT, "model.dtype=float32"), 4 * (1000 + 7200 + 120) + 20 * 780, id="fp32"),
        pytest.param((R1, RESIDENT, INT8), 2 * (1000 + 120) + 7200 + 20 * 780, id="int8, but for words and norms"),
        pytest.param((R1, INT8), 2 * 1000 + 4800 + 20 * 780, id="int8, of which two layers stay"),
        pytest.param((R1, INT8, WORDS), 1000 + 4800 + 20 * 780, id="int8 words"),
        pytest.param((R1, "model.quantize=nf4", WORDS), 1000 + 2400 + 20 * 780, id="nf4, with words in int8"),
        pytest.param((R1, "method.targets=[up]"), 2 * (1000 + 4800) + 20 * 630, id="some layers are adapted"),
        pytest.param(
            (R1, "method.targets=[other]"), 2 * (1000 + 4800) + 4 * 2000, id="none that are known: one is read in fp32"
        ),
        pytest.param(("method={kind: full}",), (4 + 4 + 8 + 4) * (1000 + 7200 + 120), id="all weights are trained"),
        pytest.param(
            ("method={kind: full}", "data.validation=null"), (4 + 4 + 8) * (1000 + 7200 + 120), id="and none are kept"
        ),
    ],
)
def test_weights_by_hand(changes, expected, tmp_path):
    model = base(
        tmp_path,
        embed_tokens__weight=(100, 10),
        **{f"layers__{at}__up__weight": (200, 10) for at in range(3)},
        **{f"layers__{at}__down__weight": (10, 40) for at in range(3)},
        **{f"layers__{at}__norm__weight": (40,) for at in range(3)},
        vision__embeddings__weight=(9000, 10),  # which a model of texts may do without
        lm_head__weight=(9000, 10),
    )
    recipe = load_recipe("sentiment-lora", [f"model.base={model}", *changes])
    assert least.tensors(Outline.of(recipe.model.base), recipe) == expected


BOUND = "budget.memory=64GiB"  # by which an account counts the libraries that `least` counts
KINDS = (*tiny.ARCHITECTURES, "deberta", "falcon", "opt", "gpt_neox", "xlnet")
METHODS = ("method.kind=dora", "method={kind: ia3}", "method={kind: full}", "method.targets=attention")
FORMS = ((INT8,), (INT8, WORDS), (RESIDENT,), (RESIDENT, INT8), ("data.validation=null",))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, ("method.rank=16",)) for kind in KINDS),
        *((kind, changes) for kind in ("bert", "modernbert", "llama", "gpt2") for changes in FORMS),
        *((kind, (method,)) for kind in ("albert", "qwen3", "gpt2") for method in METHODS),
    ],
    ids=str,
)
def test_no_account_tells_less(kind, changes, bases, reviews):
    recipe = conftest.recipe(bases(kind), reviews, BOUND, *changes)
    found = base_module.resolve(recipe.model)
    profile = profiles.profile(found, recipe.task)
    outline, accounts = Outline.of(recipe.model.base), budget.Accounts(found, profile)
    *_, frugal = budget.plans(recipe, plans.make(recipe, profile, device.find("cpu")), profile)
    told, _ = accounts.of(recipe, frugal)
    assert told.libraries == least.libraries("cpu")
    assert 0 < least.tensors(outline, recipe) <= told.total - told.libraries
    trained = profiles.trainable(recipe.method, profile) - profile.head_parameters
    assert least._added(outline, recipe.method) <= trained


@pytest.mark.parametrize("kind", ["roberta", "modernbert", "llama", "gpt2", "opt"])
def test_all_linear_layers_are_known(kind, bases, reviews):
    recipe = conftest.recipe(bases(kind), reviews, "method.rank=16")
    profile = profiles.profile(base_module.resolve(recipe.model), recipe.task)
    trained = profiles.trainable(recipe.method, profile) - profile.head_parameters
    assert least._added(Outline.of(recipe.model.base), recipe.method) == trained


def test_packed_codes_are_no_linear_layers(tmp_path):
    folder = base(tmp_path, embed__weight=(100, 64), layers__0__up__weight=(4096, 1), layers__0__down__weight=(64, 64))
    recipe = load_recipe("sentiment-lora", [f"model.base={folder}", "method.rank=1"])
    assert least._added(Outline.of(recipe.model.base), recipe.method) == 64 + 64


def test_what_a_task_s_model_may_leave_out_is_not_counted():
    layer = {f"encoder.block.0.layer.0.{name}.weight": (8, 8) for name in "qkvo"}
    shapes = layer | {
        "shared_embed.weight": (100, 8),
        "encoder.block.0.layer.0.bias": (1, 1, 512, 512),  # a mask
        "decoder.block.0.layer.0.q.weight": (800, 800),
        "mtp.layers.0.q.weight": (800, 800),
        "vision_model.layers.0.q.weight": (800, 800),
        "gpt_neox.embed_out.weight": (900, 8),
        "classifier.0.weight": (8, 8),
    }
    found = Outline.made(shapes)
    assert found.words == {"shared_embed.weight": (100, 8)}
    assert found.layers == (layer,)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 16,
        b"\x02\0\0\0\0\0\0\0{]",
        b'\x08\0\0\0\0\0\0\0{"a": 1}',
        (3 << 40).to_bytes(8, "little") + b"{}",
    ],
    ids=str,
)
def test_of_a_broken_file_nothing_is_known(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    recipe = load_recipe("sentiment-lora", [f"model.base={tmp_path}"])
    assert Outline.of(recipe.model.base) == Outline()


@pytest.mark.parametrize("name", ["starter:nothing", "no/such-base", "starter:reviews"])
def test_of_a_base_that_is_not_here_nothing_is_known(name, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRES_FT_CACHE", str(tmp_path))
    recipe = load_recipe("sentiment-lora", [f"model.base={name}"])
    assert Outline.of(recipe.model.base) == Outline()


def test_what_saves_enough_is_let_in(tmp_path):
    model = base(tmp_path, wte__weight=(50_000, 1000))
    between = limits.given(least.libraries("cpu") + 290_000_000, "cpu")  # 300 MB for words in bf16, 250 in int8
    overrides = [f"model.base={model}", INT8, f"budget.memory={between}B"]
    with pytest.raises(ModelError) as error:
        least.require(load_recipe("sentiment-lora", overrides), "cpu")
    assert re.fullmatch(
        rf"{WORDS} saves 50 MiB\. With {WORDS} it needs \d+ MiB at least\. `lowres-ft plan` .*", error.value.hint
    )
    least.require(load_recipe("sentiment-lora", [*overrides, WORDS]), "cpu")


def test_where_a_gpu_may_compute_weights_may_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(least, "_may_have_gpu", lambda: True)
    wanted = load_recipe(
        "sentiment-lora", [f"model.base={base(tmp_path, wte__weight=(10**6, 1000))}", "budget.memory=1GiB"]
    )
    least.require(wanted, "auto")
    with pytest.raises(ModelError, match=r"weights, with what is read or trained beside them, 5\.6 GiB"):
        least.require(wanted, "cpu")
