"""The account of a step on fake tensors, against the tensors of a model that is there."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowres_ft import bases as base_module
from lowres_ft import device, profiles, simulate, train
from lowres_ft import plan as plans
from lowres_ft.ledger import Cost, Ledger
from lowres_ft.model import load
from tests import conftest, tiny, tiny_chat

WIDE = {"hidden_size": 64, "intermediate_size": 128}


def made(recipe, **changes):
    base = base_module.resolve(recipe.model)
    profile = profiles.profile(base, recipe.task)
    plan = plans.make(recipe, profile, device.find("cpu")).model_copy(update=changes)
    return base, profile, plan


def held_by(adapted):
    """Bytes of all storages of a model."""
    tensors = [*adapted.model.parameters(), *adapted.model.buffers()]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


HELD = [
    ("bert", ()),
    ("bert", ("model.dtype=bfloat16",)),
    ("bert", ("model.quantize=int8",)),
    ("bert", ("model.quantize=nf4",)),
    ("bert", ("model.quantize=nf4", "model.quantize_embeddings=true", "method={kind: dora}")),
    ("distilbert", ("method={kind: ia3}", "model.quantize=int8")),
    ("roberta", ("method={kind: head}",)),
    ("modernbert", ("method={kind: full}",)),
    ("gpt2", ("model.quantize=int8",)),
    ("llama", ("method.init=pissa",)),
    ("llama", ("method.init=loftq", "model.quantize=int8")),
    ("qwen3", ("model.quantize=int8", "model.quantize_embeddings=true")),
]


@pytest.mark.parametrize(("architecture", "changes"), HELD, ids=lambda value: " ".join(value) if value else "plain")
def test_what_is_held_is_what_a_loaded_model_holds_to_the_byte(architecture, changes, bases, reviews):
    wide = {} if architecture in ("distilbert", "gpt2") else WIDE
    recipe = conftest.recipe(bases(architecture, **wide), reviews, *changes)
    base, profile, plan = made(recipe)
    adapted = load(recipe, base, profile, plan)
    found = simulate.account(recipe, base, profile, plan, 2, 8).held
    model = found.linears + found.embeddings + found.others + found.heads + found.adapter
    assert model == held_by(adapted)
    assert found == simulate.held(adapted, recipe)
    trained = sum(p.numel() for p in adapted.trained().values())
    assert found.heads + found.adapter >= 4 * trained * (not recipe.method.trains_base)
    assert found.best == sum(simulate.nbytes(tensor) for tensor in adapted.tensors().values())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_the_optimizer_is_what_its_state_holds(optimizer, bases, reviews, tmp_path):
    recipe = conftest.recipe(bases("bert", **WIDE), reviews, f"train.optimizer={optimizer}", "method.rank=64")
    ready = conftest.prepare(recipe, tmp_path)
    state = ready.start()
    next(train.train(state, ready.tokens["train"], ready.plan, ready.machine))
    held = {
        tensor.data_ptr(): simulate.nbytes(tensor)
        for one in state.optimizer.state.values()
        for name, tensor in one.items()
        if isinstance(tensor, torch.Tensor) and name != "step" and not name.startswith("qmap")
    }
    assert simulate.held(ready.adapted, recipe).optimizer == sum(held.values())


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "deberta-v2", "gpt2", "llama", "gemma3_text"])
@pytest.mark.parametrize("recompute", ["none", "layers", "selective"])
def test_what_the_forward_pass_keeps_is_what_pytorch_saves(architecture, recompute, bases, reviews, tmp_path):
    recipe = conftest.recipe(bases(architecture), reviews, f"budget.recompute={recompute}")
    ready = conftest.prepare(recipe, tmp_path)
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    static = {t.untyped_storage()._cdata for t in [*ready.adapted.model.parameters(), *ready.adapted.model.buffers()]}
    batch = simulate._batch(ready.adapted, 8, 16)
    ready.adapted.keys.set(0, batch.rows, 16, None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = ready.adapted.task.loss(ready.adapted.model, batch)
    ready.adapted.keys.clear()
    kept = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in static)
    base, profile, plan = made(recipe)
    found = simulate.account(recipe, base, profile, plan, 8, 16).training
    assert loss.requires_grad
    assert found.bytes >= 0.95 * kept
    if recompute == "none":
        assert found.most["activations"] <= 2 * kept


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("change", ["budget.recompute=none", "budget.recompute=layers", "model.quantize=int8"])
def test_layers_that_are_not_run_follow_from_those_that_are(architecture, change, bases, reviews, monkeypatch):
    recipe = conftest.recipe(bases(architecture, num_hidden_layers=9), reviews, change)
    base, profile, plan = made(recipe)
    assert profile.layers == 9
    short = simulate.account(recipe, base, profile, plan, 4, 16)
    monkeypatch.setattr(simulate, "_MORE", 9)
    whole = simulate.account(recipe, base, profile, plan, 4, 16)
    assert short.held == whole.held
    assert short.training.bytes == pytest.approx(whole.training.bytes, rel=0.02)
    assert short.evaluation.bytes == pytest.approx(whole.evaluation.bytes, rel=0.02)
    flops = [sum(cost.flops * count for cost, count in one.training.costs.items()) for one in (short, whole)]
    assert flops[0] == pytest.approx(flops[1], rel=0.02)


@pytest.mark.parametrize("layers", [2, 9])
def test_a_model_accounts_for_several_shapes_as_for_each(layers, bases, reviews):
    recipe = conftest.recipe(bases("bert", num_hidden_layers=layers), reviews)
    known = made(recipe)
    shapes = [(4, 16), (2, 32)]
    assert simulate.accounts(recipe, *known, shapes) == [simulate.account(recipe, *known, *shape) for shape in shapes]


def test_recomputation_and_smaller_micro_batches_take_less(bases, reviews):
    recipe = conftest.recipe(bases("llama", num_hidden_layers=4), reviews)
    base, profile, plan = made(recipe)

    def most(rows, **changes):
        return simulate.account(recipe, base, profile, plan.model_copy(update=changes), rows, 32).training.bytes

    none, selective, layers = (most(8, recompute=how) for how in ("none", "selective", "layers"))
    assert none > selective > layers
    assert none > most(4) > most(2)


def test_a_chat_model_is_accounted_for_with_chunks_of_logits(chat_bases, chats):
    recipe = tiny_chat.recipe(chat_bases("llama"), chats)
    base, profile, plan = made(recipe)
    found = simulate.account(recipe, base, profile, plan, 4, 32)
    assert found.training.most["activations"] > 0
    assert 0 < found.evaluation.bytes < found.training.bytes


def test_flops_are_those_of_the_products(bases, reviews):
    recipe = conftest.recipe(bases("bert"), reviews, "method={kind: head}")
    base, profile, plan = made(recipe)
    rows, width, (hidden, inner) = 2, 16, (32, 64)
    found = simulate.account(recipe, base, profile, plan, rows, width).evaluation
    layer = 4 * hidden * hidden + 2 * hidden * inner + 2 * width * hidden
    tokens = 2 * rows * width
    head = 2 * rows * (hidden * hidden + hidden * 2)
    assert sum(cost.flops * n for cost, n in found.costs.items()) == pytest.approx(
        2 * (2 * tokens * layer + head), rel=0.01
    )


def test_what_is_computed_is_counted_and_what_is_asked_is_not():
    ledger = Ledger()
    with FakeTensorMode(allow_non_fake_inputs=True), ledger, ledger.during("work"):
        a, b = torch.zeros(4, 8), torch.zeros(8, 2)
        assert a.device.type == "cpu"
        torch.softmax(a @ b, -1).exp_().add_(1.0)
    made = {cost: count for cost, count in ledger.costs.items() if cost.flops or cost.function}
    assert made == {
        Cost(2 * 4 * 8 * 2, 4 * (32 + 16 + 8)): 1,
        Cost(0, 2 * 4 * 8, function=True): 1,
        Cost(0, 32, True): 1,
    }
    assert sum(ledger.costs.values()) == 6  # two tensors of zeros, and the addition beside


def test_values_that_are_known_stay_and_others_are_made_up():
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger():
        known = torch.tensor(5)
        assert known.item() == 5
        assert known.add(torch.zeros((), dtype=torch.int64).repeat(3).sum()).item() == 1
        assert torch.rand(3).sum().item() == 0.0


def test_tiny_bases_of_every_architecture_can_be_accounted_for(bases, reviews):
    counted = 0
    for architecture in tiny.ARCHITECTURES:
        recipe = conftest.recipe(bases(architecture), reviews)
        base, profile, plan = made(recipe)
        assert simulate.account(recipe, base, profile, plan, 2, 8).training.bytes > 0
        counted += 1
    assert counted == 13
