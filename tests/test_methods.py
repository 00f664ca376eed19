"""Every method on every storage: round trips through a fresh process and PEFT, merges, counts, refusals."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowres_ft import device, evaluate, reading, registry
from lowres_ft.bundle import open_bundle
from lowres_ft.errors import ModelError, RecipeError
from lowres_ft.linear import AdaptedLinear
from lowres_ft.merging import merge
from lowres_ft.model import Adapted
from lowres_ft.optimizers import _groups
from lowres_ft.parts import TrainSpec
from lowres_ft.pipeline import run
from lowres_ft.preparing import rehearse
from lowres_ft.recipe import Recipe
from lowres_ft.storage import Plain
from lowres_ft.train import train
from tests.conftest import Prepared, prepare, recipe
from tests.test_round_trip import compare
from tests.test_train import gradients, randomize

Bases = Callable[..., Path]
WIDE = {
    "bert": {"hidden_size": 64, "intermediate_size": 128},
    "gpt2": {"n_embd": 64},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
}
"""Tiny bases whose layers are as wide as nf4's blocks."""


def wide(bases: Bases, reviews: Path, architecture: str, *overrides: str) -> Recipe:
    return recipe(bases(architecture, **WIDE[architecture]), reviews, *overrides)


def test_nf4_round_trips_and_is_near_the_unquantized_base(bases: Bases, reviews: Path, tmp_path: Path):
    """PEFT's client has the unquantized base, so its logits are near, not equal."""
    wanted = {name: wide(bases, reviews, name, "model.quantize=nf4") for name in WIDE}
    bundles = compare(wanted, tmp_path, tolerance=0.5)
    for name, folder in bundles.items():
        bundle = open_bundle(folder)
        checked = bundle.verify(device.find("cpu"))
        assert (checked.exact, checked.largest_difference) == (True, 0.0)
        merged = merge(bundle, tmp_path / f"{name}.merged", device.find("cpu"))
        assert merged.largest_difference <= 1e-4
        assert merged.from_measured is not None
        assert 1e-3 < merged.from_measured < 0.5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_nf4_trains_in_16_bits(bases: Bases, reviews: Path, tmp_path: Path, dtype: str):
    for name in WIDE:
        run(wide(bases, reviews, name, "model.quantize=nf4", f"model.dtype={dtype}"), tmp_path / name)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_codes_do_not_depend_on_the_dtype_that_computes(bases: Bases, reviews: Path, tmp_path: Path, form: str):
    found = []
    for dtype in ("float32", "bfloat16"):
        wanted = wide(bases, reviews, "bert", f"model.quantize={form}", f"model.dtype={dtype}")
        model = prepare(wanted, tmp_path / dtype).adapted.model
        assert {p.dtype for n, p in model.named_parameters() if "lora" not in n and "classifier" not in n} == {
            getattr(torch, dtype)
        }
        found.append({n: m.storage.weight for n, m in model.named_modules() if isinstance(m, AdaptedLinear)})
    assert len(found[0]) == 13
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())


@pytest.mark.parametrize("form", ["none", "int8", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_the_same_before_and_after_an_evaluation(
    bases: Bases, reviews: Path, tmp_path: Path, form: str, dtype: str
):
    """bitsandbytes' own nf4 layers lose the base's part of the gradient once they were evaluated."""
    for name in WIDE:
        prepared = prepare(
            wide(bases, reviews, name, f"model.quantize={form}", f"model.dtype={dtype}"), tmp_path / name
        )
        randomize(prepared)
        before = gradients(prepared, 10_000)
        evaluate.outputs(prepared.adapted, prepared.tokens["validation"], prepared.plan)
        after = gradients(prepared, 10_000)
        assert before.keys() == after.keys() == prepared.adapted.trained().keys()
        assert all(torch.equal(gradient, after[name]) for name, gradient in before.items())
        assert all(bool(gradient.abs().max() > 0) for name, gradient in before.items() if "lora" in name)


@pytest.mark.parametrize("form", ["none", "int8", "nf4"])
def test_training_goes_on_the_same_after_an_evaluation(bases: Bases, reviews: Path, tmp_path: Path, form: str):
    found = []
    for evaluated in (False, True):
        prepared = prepare(
            wide(bases, reviews, "bert", f"model.quantize={form}", "train.steps=4"), tmp_path / f"{evaluated}"
        )
        model = prepared.adapted.model
        for _ in train(prepared.start(), prepared.tokens["train"], prepared.plan, prepared.machine):
            if evaluated:
                with torch.inference_mode():
                    model.eval()(input_ids=torch.tensor([[5, 6, 7]]))
        found.append(prepared.adapted.tensors())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_widths_that_nf4_cannot_hold_are_refused_before_anything_is_loaded(
    bases: Bases, reviews: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(reading, "options", lambda *_: pytest.fail("weights are read"))
    wanted = recipe(bases("gpt2", n_embd=96), reviews, "model.quantize=nf4")
    told = r"blocks of 64, which do not divide the 96 inputs of transformer.h.0.attn.c_attn \(and 5 more\)"
    for act in (lambda: rehearse(wanted, device_name="cpu"), lambda: run(wanted, tmp_path / "out", device_name="cpu")):
        with pytest.raises(ModelError, match=told):
            act()


METHODS = {
    "dora": ("method.kind=dora", "method.rank=4"),
    "ia3": ("method.kind=ia3",),
    "lora+": ("method.rate_ratio=8",),
    "pissa": ("method.init=pissa",),
    "loftq": ("method.init=loftq",),
}
STORED = [
    (method, form)
    for method in METHODS
    for form in ("none", "int8", "nf4")
    if (method, form == "none") not in (("pissa", False), ("loftq", True))
]
PLAIN = tuple(method for method, form in STORED if form == "none")
QUANTIZED = tuple(method for method, form in STORED if form == "int8" and method != "loftq")


def compare_and_merge(wanted: dict[str, Recipe], folder: Path, tolerance: float = 1e-5) -> dict[str, Path]:
    """Round trips, as `compare` sees them; and each bundle is merged into its base without changing an answer."""
    bundles = compare(wanted, folder, tolerance)
    for name, place in bundles.items():
        merged = merge(open_bundle(place), folder / f"{name}.merged", device.find("cpu"))
        assert merged.largest_difference <= 2e-5, name
        assert not merged.flipped, name
    return bundles


def test_all_methods_are_merged_on_all_storages():
    """By the three tests that follow."""
    methods = {"none": PLAIN, "int8": (*QUANTIZED, "loftq"), "nf4": (*QUANTIZED, "loftq")}
    assert {(method, form) for form, names in methods.items() for method in names} == set(STORED)


def test_methods_round_trip_and_merge(bases: Bases, reviews: Path, tmp_path: Path):
    wanted = {f"{method}.{name}": wide(bases, reviews, name, *METHODS[method]) for method in PLAIN for name in WIDE}
    bundles = compare_and_merge(wanted, tmp_path)
    config = json.loads((bundles["pissa.gpt2"] / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 64, True)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_methods_round_trip_and_merge_on_quantized_bases(bases: Bases, reviews: Path, tmp_path: Path, form: str):
    """PEFT's client has the unquantized base, so its logits are near, not equal: by 0.01 for int8, 0.3 for nf4."""
    wanted = {
        f"{method}.{name}": wide(bases, reviews, name, f"model.quantize={form}", *METHODS[method])
        for method in QUANTIZED
        for name in WIDE
    }
    compare_and_merge(wanted, tmp_path, tolerance=0.02 if form == "int8" else 0.5)


def test_loftq_round_trips_on_the_quantized_base_that_its_card_loads_and_merges(
    bases: Bases, reviews: Path, tmp_path: Path
):
    """bitsandbytes' own products round in bf16 and 8 bits; on another base logits are off by ten times as much."""
    wanted = {
        f"{name}.{form}": wide(bases, reviews, name, f"model.quantize={form}", *METHODS["loftq"])
        for name in WIDE
        for form in ("int8", "nf4")
    }
    compare_and_merge(wanted, tmp_path, tolerance=0.02)


@pytest.mark.parametrize("form", ["none", "int8", "nf4"])
def test_what_is_trained_is_what_the_profile_counts(bases: Bases, reviews: Path, tmp_path: Path, form: str):
    kinds = {kind: (f"method.kind={kind}",) for kind in registry.names("methods") if kind != "full" or form == "none"}
    kinds |= {method: changes for method, changes in METHODS.items() if (method, form) in STORED}
    for kind, changes in kinds.items():
        for name in WIDE:
            wanted = wide(bases, reviews, name, f"model.quantize={form}", *changes)
            prepared = prepare(wanted, tmp_path / f"{kind}.{name}")
            planned = rehearse(wanted, device_name="cpu").trainable_parameters
            assert sum(p.numel() for p in prepared.adapted.trained().values()) == planned


def logits(adapted: Adapted) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = adapted.model(input_ids=torch.tensor([[5, 6, 7], [9, 8, 7]])).logits
    return found


@pytest.mark.parametrize(("method", "form"), [(method, form) for method, form in STORED if method != "loftq"])
def test_a_new_adapter_changes_nothing(bases: Bases, reviews: Path, tmp_path: Path, method: str, form: str):
    for name in WIDE:
        found = [
            logits(prepare(wide(bases, reviews, name, f"model.quantize={form}", *changes), tmp_path / "work").adapted)
            for changes in (("method.kind=head",), METHODS[method])
        ]
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)  # of another product, by rounding on some processors


def test_lora_plus_trains_b_at_its_own_rate(bases: Bases, reviews: Path, tmp_path: Path):
    """Adam's first step moves a weight by its learning rate, so B's first step is the ratio times as long."""
    found = []
    for ratio in (1, 8):
        wanted = recipe(bases(), reviews, f"method.rate_ratio={ratio}", "train.weight_decay=0", "train.clip=null")
        prepared = prepare(wanted, tmp_path / str(ratio))
        state = prepared.start()
        before = prepared.adapted.tensors()
        before = {name: tensor.clone() for name, tensor in before.items()}
        next(train(state, prepared.tokens["train"], prepared.plan, prepared.machine))
        found.append({name: t - before[name] for name, t in prepared.adapted.tensors().items()})
        held = state.state_dict()
        again = prepared.start()
        again.load_state_dict(held)
        assert [g["rate"] for g in again.optimizer.param_groups] == [g["rate"] for g in state.optimizer.param_groups]
    for name, step in found[0].items():
        torch.testing.assert_close(step * (8 if name.endswith("lora_B") else 1), found[1][name])
    assert any(bool(step.abs().max() > 0) for name, step in found[0].items() if name.endswith("lora_B"))


def test_weight_decay_is_for_matrices_alone(bases: Bases, reviews: Path, tmp_path: Path):
    for kind, vectors in (("ia3", "ia3_l"), ("dora", "lora_magnitude_vector")):
        adapted = prepare(recipe(bases(), reviews, f"method.kind={kind}"), tmp_path / kind).adapted
        groups = _groups(adapted, TrainSpec(weight_decay=0.5))
        decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        for name, parameter in adapted.trained().items():
            assert decays[id(parameter)] == (0.0 if name.endswith((vectors, "bias")) else 0.5)


def test_architectures_with_traits_of_their_own_round_trip(bases: Bases, reviews: Path, tmp_path: Path):
    dora, ia3 = ("method.dropout=0.1", *METHODS["dora"]), METHODS["ia3"]
    wanted = {  # projections split in place, fused heads, texts flattened
        "dora": recipe(bases("deberta"), reviews, *dora),
        "ia3": recipe(bases("deberta"), reviews, *ia3),
        "fused": recipe(bases("falcon"), reviews, *ia3),
        "flattened": recipe(bases("opt"), reviews, *dora),
    }
    compare(wanted, tmp_path)


@pytest.mark.parametrize(
    ("method", "form"), [("dora", "none"), ("dora", "nf4"), ("ia3", "int8"), ("pissa", "none"), ("loftq", "nf4")]
)
def test_every_cut_gives_the_same_gradient(bases: Bases, reviews: Path, tmp_path: Path, method: str, form: str):
    changes = [*METHODS[method], f"model.quantize={form}", "train.batch_size=32"]
    changes += [] if method == "ia3" else ["method.dropout=0.1"]
    prepared = prepare(wide(bases, reviews, "bert", *changes), tmp_path)
    randomize(prepared)
    whole, parts = gradients(prepared, 10_000), gradients(prepared, 40)
    gaps = torch.stack([(gradient - parts[name]).norm() for name, gradient in whole.items()])
    norms = torch.stack([gradient.norm() for gradient in whole.values()])
    assert gaps.norm() < 1e-5 * norms.norm()


REFUSED = {
    (
        "method.init=pissa",
        "model.quantize=int8",
    ): "method.init=pissa trains a part of W, which int8 weights do not hold",
    ("method.init=pissa", "model.quantize=nf4"): "method.init=pissa trains a part of W, which nf4 weights do not hold",
    ("method.init=loftq",): "method.init=loftq makes up for quantization, and there is none",
    ("method.kind=dora", "method.init=pissa"): "method.init: is not a key here",
    ("method.kind=full", "model.quantize=nf4"): "full trains every weight, and nf4 weights cannot be trained",
    ("method.rate_ratio=0.5",): "method.rate_ratio: must be at least 1, found 0.5",
}


@pytest.mark.parametrize(("changes", "told"), REFUSED.items())
def test_what_cannot_be_combined_is_refused_by_the_recipe(
    bases: Bases, reviews: Path, changes: tuple[str, ...], told: str
):
    with pytest.raises(RecipeError, match=told):
        recipe(bases(), reviews, *changes)


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_goes_on_from_its_state_and_returns_as_plain_lora(
    bases: Bases, reviews: Path, tmp_path: Path, rslora: bool
):
    changes = ("method.init=pissa", "method.rank=3", f"method.rslora={rslora}", "train.steps=6", "method.dropout=0.1")
    wanted = recipe(bases(), reviews, *changes)
    prepared = prepare(wanted, tmp_path / "work")
    state = prepared.start()
    running = train(state, prepared.tokens["train"], prepared.plan, prepared.machine)
    for _ in range(3):
        next(running)
    held = state.state_dict()
    for _ in running:
        pass
    straight = {name: tensor.clone() for name, tensor in prepared.adapted.tensors().items()}
    again = prepared.start()
    again.load_state_dict(held)
    for _ in train(again, prepared.tokens["train"], prepared.plan, prepared.machine):
        pass
    assert all(torch.equal(tensor, straight[name]) for name, tensor in prepared.adapted.tensors().items())
    bundle = run(wanted, tmp_path / "bundle", device_name="cpu")
    loaded, _ = bundle.load(device.find("cpu"))
    assert torch.equal(logits(prepared.adapted), logits(loaded))
    ranks = {len(tensor) for name, tensor in loaded.tensors().items() if name.endswith("lora_A")}
    assert ranks == {6}
    compare({"pissa": wanted}, tmp_path)


def weights(prepared: Prepared) -> dict[str, torch.Tensor]:
    layers = prepared.adapted.model.named_modules()
    return {name: layer.merged()[0] for name, layer in layers if isinstance(layer, AdaptedLinear)}


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_loftq_begins_nearer_to_the_unquantized_base(bases: Bases, reviews: Path, tmp_path: Path, form: str):
    for name in WIDE:
        exact = weights(prepare(wide(bases, reviews, name), tmp_path / "work"))
        found = []
        for init in ("default", "loftq"):
            changes = (f"model.quantize={form}", f"method.init={init}", "method.rank=16")
            found.append(weights(prepare(wide(bases, reviews, name, *changes), tmp_path / "work")))
        assert exact.keys() == found[0].keys()
        for layer, weight in exact.items():
            lost, less = ((weight - other[layer]).norm() for other in found)
            assert less < 0.9 * lost


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_loftq_stays_on_the_weights_that_it_corrects(bases: Bases, reviews: Path, tmp_path: Path, form: str):
    """On the unquantized base it would count its correction twice."""
    changes = (f"model.quantize={form}", "method.init=loftq", "method.targets=attention", "model.dtype=bfloat16")
    for name in WIDE:
        bundle = run(wide(bases, reviews, name, *changes), tmp_path / name, device_name="cpu")
        quantized, _ = bundle.load(device.find("cpu"), dtype="float32")
        plain, _ = bundle.load(device.find("cpu"), dtype="float32", quantize="none")
        torch.testing.assert_close(logits(quantized), logits(plain), rtol=1e-4, atol=1e-4)
        layers = [layer for layer in plain.model.modules() if isinstance(layer, AdaptedLinear)]
        assert all(isinstance(layer.storage, Plain) for layer in layers)
        assert len(layers) > len(plain.adapted)
        assert bundle.verify(device.find("cpu")).exact
        merged = merge(bundle, tmp_path / f"{name}.merged", device.find("cpu"))
        assert merged.largest_difference <= 1e-4
        card = (bundle.folder / "README.md").read_text()
        assert f"quantization_config=BitsAndBytesConfig(load_in_{8 if form == 'int8' else 4}bit=True" in card
        assert "llm_int8_skip_modules=['" in card
