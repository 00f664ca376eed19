"""Activations computed again: the same gradients to the bit, no product of a frozen weight twice but where asked."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowres_ft import evaluate
from lowres_ft.errors import ModelError
from lowres_ft.pipeline import run
from lowres_ft.preparing import rehearse
from lowres_ft.recipe import Recipe
from lowres_ft.storage import Plain
from tests import tiny, tiny_chat
from tests.conftest import Prepared, prepare, recipe
from tests.test_methods import wide
from tests.test_train import finish, gradients, randomize

Bases = Callable[..., Path]
HOW = ("layers", "selective")
METHODS = {
    "lora": ("method.dropout=0.1",),
    "attention": ("method.targets=attention",),
    "dora": ("method.kind=dora", "method.dropout=0.1"),
    "ia3": ("method.kind=ia3",),
    "pissa": ("method.init=pissa",),
    "head": ("method.kind=head",),
    "full": ("method.kind=full", "train.learning_rate=0.001"),
}


def first_gradients(wanted: Recipe, work: Path) -> dict[str, Tensor]:
    prepared = prepare(wanted, work)
    randomize(prepared)
    return gradients(prepared, 100)


def same_gradients(wanted: Callable[..., Recipe], work: Path) -> None:
    """What is trained gets the same gradient however its activations come."""
    plain = first_gradients(wanted(), work)
    assert any(bool(gradient.abs().max() > 0) for gradient in plain.values())
    for how in HOW:
        again = first_gradients(wanted(f"budget.recompute={how}"), work)
        assert plain.keys() == again.keys()
        assert all(torch.equal(gradient, again[name]) for name, gradient in plain.items()), how


@pytest.mark.parametrize("architecture", sorted(set(tiny.ARCHITECTURES) - {"albert"}))
def test_each_architecture_gets_the_same_gradients(architecture: str, bases: Bases, reviews: Path, tmp_path: Path):
    same_gradients(lambda *more: recipe(bases(architecture), reviews, *METHODS["lora"], *more), tmp_path)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["none", "int8", "nf4"])
def test_each_method_on_each_storage_gets_the_same_gradients(
    method: str, form: str, bases: Bases, reviews: Path, tmp_path: Path
):
    if form != "none" and method in ("pissa", "full"):
        return
    changes = (f"model.quantize={form}", *METHODS[method])
    same_gradients(lambda *more: wide(bases, reviews, "llama", *changes, *more), tmp_path)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_get_the_same_gradients(method: str, dtype: str, bases: Bases, reviews: Path, tmp_path: Path):
    changes = (f"model.dtype={dtype}", *METHODS[method])
    same_gradients(lambda *more: wide(bases, reviews, "bert", *changes, *more), tmp_path)


def test_dropout_in_the_base_draws_the_same_again(bases: Bases, reviews: Path, tmp_path: Path):
    changes = ("model.dropout=0.2", *METHODS["lora"])
    same_gradients(lambda *more: recipe(bases("bert"), reviews, *changes, *more), tmp_path)


def test_chat_gets_the_same_gradients(chat_bases: Bases, chats: Path, tmp_path: Path):
    for quantize in ("none", "int8"):
        changes = (f"model.quantize={quantize}", *METHODS["lora"])
        same_gradients(lambda *more, c=changes: tiny_chat.recipe(chat_bases("llama"), chats, *c, *more), tmp_path)


def counted(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """How many products of plain frozen weights a step's gradient and an evaluation take."""
    calls = []
    product = Plain._product
    with monkeypatch.context() as patch:
        patch.setattr(Plain, "_product", lambda *given: calls.append(1) or product(*given))
        gradients(prepared, 10_000)
        for_gradient = len(calls)
        evaluate.outputs(prepared.adapted, prepared.tokens["validation"], prepared.plan)
    return for_gradient, len(calls) - for_gradient


def test_a_selection_spares_the_products_of_frozen_weights(
    bases: Bases, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    found = {}
    for how in ("none", *HOW):
        prepared = prepare(wide(bases, reviews, "llama", f"budget.recompute={how}"), tmp_path / how)
        assert prepared.plan.recompute == how
        found[how] = counted(prepared, monkeypatch)
    once, evaluated = found["none"]
    assert found == {"none": (once, evaluated), "layers": (2 * once, evaluated), "selective": (once, evaluated)}


def kept(wanted: Recipe, work: Path) -> int:
    """Bytes that are kept for the backward pass outside the layers that are computed again."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    prepared = prepare(wanted, work)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradients(prepared, 10_000)
    return sum(sizes.values())


def test_less_is_kept(bases: Bases, reviews: Path, tmp_path: Path):
    plain, layers = (
        kept(wide(bases, reviews, "llama", f"budget.recompute={how}"), tmp_path) for how in ("none", "layers")
    )
    assert layers < plain / 3


def test_a_run_and_its_bundle_are_the_same(bases: Bases, reviews: Path, tmp_path: Path):
    found = []
    for how in ("none", *HOW):
        prepared = prepare(wide(bases, reviews, "gpt2", f"budget.recompute={how}"), tmp_path / how)
        found.append(finish(prepared, prepared.start()))
    assert all(torch.equal(tensor, other[name]) for other in found[1:] for name, tensor in found[0].items())
    bundle = run(wide(bases, reviews, "gpt2", "budget.recompute=layers"), tmp_path / "bundle", device_name="cpu")
    assert bundle.passport.plan.recompute == "layers"


def test_the_plan_decides_where_the_recipe_does_not(bases: Bases, reviews: Path, tmp_path: Path):
    assert rehearse(recipe(bases(), reviews), device_name="cpu").plan.recompute == "none"


def test_a_base_that_repeats_one_layer_is_refused_before_it_is_loaded(
    bases: Bases, reviews: Path, monkeypatch: pytest.MonkeyPatch
):
    told = r"budget.recompute=layers: this base has no list of its 2 layers"
    with pytest.raises(ModelError, match=told):
        rehearse(recipe(bases("albert"), reviews, "budget.recompute=layers"), device_name="cpu")
