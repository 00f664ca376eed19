"""Layers that pass through room for two of them: the same bits, and never more than two resident."""

import gc
import json
import re
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowres_ft import bases as base_module
from lowres_ft import (
    budget,
    device,
    evaluate,
    folders,
    limits,
    mapped,
    memory,
    model,
    profiles,
    reading,
    simulate,
    streaming,
)
from lowres_ft import plan as plans
from lowres_ft.bases import Base
from lowres_ft.errors import ModelError
from lowres_ft.pipeline import run
from lowres_ft.preparing import rehearse
from lowres_ft.recipe import Recipe
from lowres_ft.streaming import Copies, Pages, Slots
from lowres_ft.train import train
from tests import tiny, tiny_chat
from tests.conftest import Prepared, prepare, recipe
from tests.test_methods import WIDE
from tests.test_recompute import METHODS
from tests.test_train import randomize

Bases = Callable[..., Path]
STREAMED = {name: changes for name, changes in METHODS.items() if name != "full"}
DEPTHS = {"distilbert": "n_layers", "gpt2": "n_layer"}


def deep(bases: Bases, architecture: str, **changes: object) -> Path:
    """A base of five layers."""
    return bases(architecture, **{DEPTHS.get(architecture, "num_hidden_layers"): 5}, **changes)


def results(prepared: Prepared) -> tuple[list[object], dict[str, Tensor]]:
    """Losses of all steps and evaluations between them, and what was learned."""
    randomize(prepared)
    told: list[object] = []
    for step in train(prepared.start(), prepared.tokens["train"], prepared.plan, prepared.machine):
        outputs = evaluate.outputs(prepared.adapted, prepared.tokens["validation"], prepared.plan)
        told.append((step.loss, step.gradient_norm, outputs.values.tolist()))
    return told, {name: tensor.clone() for name, tensor in prepared.adapted.tensors().items()}


def same(resident: Prepared, passing: Prepared) -> None:
    """Both learn the same to the bit, one of them with two layers at a time."""
    assert resident.adapted.stream is None
    plain, passed = results(resident), results(passing)
    assert plain[0] == passed[0]
    assert plain[1].keys() == passed[1].keys()
    assert all(torch.equal(tensor, passed[1][name]) for name, tensor in plain[1].items())
    stream = passing.adapted.stream
    assert stream is not None
    assert stream.most == 2
    assert stream.entered >= 2 * 2 * stream.count  # forward, in training and evaluation of two steps


def both(made: Callable[..., Recipe], work: Path) -> None:
    """Train a recipe with its layers resident and passing."""
    same(*(prepare(made(f"budget.offload={how}"), work / how) for how in ("none", "layers")))


@pytest.mark.parametrize("architecture", sorted(set(tiny.ARCHITECTURES) - {"albert"}))
def test_each_architecture_learns_the_same(architecture: str, bases: Bases, reviews: Path, tmp_path: Path):
    both(lambda *more: recipe(deep(bases, architecture), reviews, *METHODS["lora"], *more), tmp_path)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])  # of which one holds its weights transposed
def test_weights_that_are_written_part_by_part_are_the_same(
    architecture: str, bases: Bases, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reading, "_PART", 200)
    both(lambda *more: recipe(deep(bases, architecture), reviews, *METHODS["lora"], *more), tmp_path)


@pytest.mark.parametrize(
    ("architecture", "offload", "room", "passes"),
    [
        *(("bert", "auto", 0, True), ("bert", "auto", 2**30, False), ("bert", "none", 0, False)),
        ("albert", "auto", 0, False),  # which cannot
    ],
)
def test_where_a_bound_leaves_little_a_bundle_is_sealed_with_layers_that_pass(
    architecture: str,
    offload: str,
    room: int,
    passes: bool,
    bases: Bases,
    reviews: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    loaded: list[Any] = []
    load = model.load
    monkeypatch.setattr(model, "load", lambda *args, **options: loaded.append(load(*args, **options)) or loaded[-1])
    wanted = recipe(deep(bases, architecture), reviews, "train.steps=2", f"budget.offload={offload}")
    plain = run(wanted, tmp_path / "plain", device_name="cpu")
    assert [one.stream for one in loaded] == [None] * 3  # as it is trained, and sealed in both dtypes
    monkeypatch.setattr(limits, "left", lambda: room)
    bounded = run(wanted, tmp_path / "bounded", device_name="cpu")
    assert [one.stream is not None for one in loaded[3:]] == [False, passes, passes]
    probes = [load_file(bundle.folder / "probe.safetensors") for bundle in (plain, bounded)]
    assert torch.equal(probes[0]["logits"], probes[1]["logits"])


@pytest.mark.parametrize(
    ("held", "said", "dtype"), [("float32", "float16", "float32"), ("bfloat16", "bfloat16", "float32")]
)
def test_weights_pass_in_what_files_hold_whatever_the_config_says(
    held: str, said: str, dtype: str, bases: Bases, reviews: Path, tmp_path: Path
):
    base = tmp_path / "base"
    shutil.copytree(deep(bases, "bert"), base)
    weights = load_file(base / "model.safetensors")
    save_file({name: one.to(getattr(torch, held)) for name, one in weights.items()}, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": said}))
    both(lambda *more: recipe(base, reviews, f"model.dtype={dtype}", *more), tmp_path)


@pytest.mark.parametrize("method", STREAMED)
@pytest.mark.parametrize("form", ["none", "int8", "nf4"])
def test_each_method_on_each_storage_learns_the_same(
    method: str, form: str, bases: Bases, reviews: Path, tmp_path: Path
):
    if form != "none" and method == "pissa":
        return
    base = deep(bases, "llama", **WIDE["llama"])
    both(lambda *more: recipe(base, reviews, f"model.quantize={form}", *STREAMED[method], *more), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        ("budget.recompute=layers",),
        ("budget.recompute=selective", "model.quantize=int8"),
        ("model.dtype=bfloat16",),
        ("model.quantize=int8", "model.quantize_embeddings=true"),
        ("model.dropout=0.2",),
        ("method.targets=attention", "model.dtype=bfloat16"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("architecture", ["gpt2", "modernbert"])
def test_each_setting_learns_the_same(
    architecture: str, changes: Sequence[str], bases: Bases, reviews: Path, tmp_path: Path
):
    both(
        lambda *more: recipe(deep(bases, architecture, **WIDE.get(architecture, {})), reviews, *changes, *more),
        tmp_path,
    )


def test_chat_learns_the_same(chat_bases: Bases, chats: Path, tmp_path: Path):
    base = chat_bases("llama", num_hidden_layers=5)
    both(lambda *more: tiny_chat.recipe(base, chats, "model.quantize=int8", *more), tmp_path)


class Now:
    """Copies at once, as early as a stream of their own may: what is still in use would be lost."""

    def start(self, slot: Tensor, source: Tensor) -> Callable[[], None]:
        slot.copy_(source)
        return lambda: None


class Late:
    """Copies when something waits for it, as late as a stream of their own may: what nothing waits for never comes."""

    def start(self, slot: Tensor, source: Tensor) -> Callable[[], None]:
        slot.fill_(0x7F)

        def finish() -> None:
            slot.copy_(source)

        return finish


def slotted(prepared: Prepared, copies: Copies, profile_stack: str) -> Prepared:
    """A model whose layers pass as on a GPU."""
    adapted = prepared.adapted
    layers = list(adapted.model.get_submodule(profile_stack).children())
    held = list(streaming._blocks(layers, ()))
    stream = streaming.through_slots(adapted.model, layers, held, copies, torch.device("cpu"))
    object.__setattr__(adapted, "stream", stream)
    return prepared


def stack(wanted: Recipe) -> str:
    found = profiles.profile(model_base(wanted), wanted.task).stack
    assert found is not None
    return found


def model_base(wanted: Recipe) -> Base:
    return base_module.resolve(wanted.model)


SLOTTED = [
    ("llama", ("model.quantize=nf4", "method.dropout=0.1")),
    ("llama", ("model.quantize=int8", "budget.recompute=layers")),
    ("gpt2", ("method.targets=attention",)),
    ("modernbert", ("budget.recompute=selective", "method={kind: dora}")),
    ("gemma", ("model.dtype=bfloat16",)),
    ("deberta-v2", ("method={kind: ia3}",)),
    ("bert", ("method={kind: head}",)),
]


@pytest.mark.parametrize("copies", [Now(), Late()], ids=["now", "late"])
@pytest.mark.parametrize(
    ("architecture", "changes"), SLOTTED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_slots_give_the_same_bits_however_early_or_late_copies_come(
    architecture: str, changes: Sequence[str], copies: Copies, bases: Bases, reviews: Path, tmp_path: Path
):
    wanted = recipe(deep(bases, architecture, **WIDE.get(architecture, {})), reviews, *changes)
    resident, passing = (prepare(wanted, tmp_path / name) for name in ("resident", "passing"))
    same(resident, slotted(passing, copies, stack(wanted)))
    place = passing.adapted.stream.place  # type: ignore[union-attr]
    assert isinstance(place, Slots)
    assert place.copied < sum(source.numel() for source in place.sources) * 2 * passing.adapted.stream.entered  # type: ignore[union-attr]


def test_layers_stay_usable_after_a_pass_that_was_interrupted(bases: Bases, reviews: Path, tmp_path: Path):
    wanted = recipe(deep(bases, "llama"), reviews)
    resident, passing = (prepare(wanted, tmp_path / name) for name in ("resident", "passing"))
    slotted(passing, Late(), stack(wanted))
    middle = passing.adapted.model.get_submodule(stack(wanted))[3]  # type: ignore[index]

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    hook = middle.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        evaluate.outputs(passing.adapted, passing.tokens["validation"], passing.plan)
    hook.remove()
    same(resident, passing)


@pytest.mark.parametrize("how", ["pages", "slots"])
def test_what_was_learned_can_be_merged(how: str, bases: Bases, reviews: Path, tmp_path: Path):
    wanted = recipe(deep(bases, "llama", **WIDE["llama"]), reviews, "model.quantize=int8")
    offload = "layers" if how == "pages" else "none"
    resident, passing = (
        prepare(wanted.model_copy(update={"budget": wanted.budget.model_copy(update={"offload": one})}), tmp_path / one)
        for one in ("auto", offload)
    )
    if how == "slots":
        slotted(passing, Late(), stack(wanted))
    for name, one in (("a", resident), ("b", passing)):
        results(one)
        model.merge(one.adapted)
        folders.save_plain(one.adapted, tmp_path / name)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def pages_in_memory() -> int:
    """Bytes of our files' pages that this process has in memory."""
    held, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = "/streaming/" in line
        elif ours and line.startswith("Rss:"):
            held += int(line.split()[1]) * 1024
    return held


def test_no_more_than_two_layers_are_in_memory(bases: Bases, reviews: Path, tmp_path: Path):
    """Of five layers of 2 MiB each, while they are read as while they compute."""
    base = bases("bert", num_hidden_layers=5, hidden_size=256, intermediate_size=512)
    gc.collect()
    before, most = pages_in_memory(), []
    copied = Tensor.copy_

    def watched(tensor: Tensor, *given: Any) -> Tensor:
        found = copied(tensor, *given)
        most.append(pages_in_memory())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "copy_", watched)
        passing = prepare(recipe(base, reviews, "budget.offload=layers"), tmp_path)
    place = passing.adapted.stream.place  # type: ignore[union-attr]
    assert isinstance(place, Pages)
    largest = max(block.size for block in place.layers)
    assert largest == 2 * 2**20
    show = place.show

    def seen(at: int, ahead: int | None) -> None:
        most.append(pages_in_memory())  # of the layer before, which is done, forward or backward
        show(at, ahead)

    place.show = seen  # type: ignore[method-assign]
    results(passing)
    assert largest <= max(most) - before <= 2 * largest + 2**20
    assert not list((mapped.cache_dir() / "streaming").iterdir())


@pytest.mark.parametrize("how", ["pages", "slots"])
def test_a_model_that_is_done_with_goes_at_once(how: str, bases: Bases, reviews: Path, tmp_path: Path):
    wanted = recipe(deep(bases, "llama"), reviews, f"budget.offload={'layers' if how == 'pages' else 'none'}")
    one = prepare(wanted, tmp_path)
    if how == "slots":
        slotted(one, Now(), stack(wanted))
    results(one)
    gc.disable()
    left = weakref.ref(one.adapted.model)
    del one
    gc.enable()
    assert left() is None


def test_weights_that_lie_elsewhere_are_moved_into_blocks(bases: Bases, reviews: Path, tmp_path: Path):
    wanted = recipe(deep(bases, "llama"), reviews)
    resident, passing = (prepare(wanted, tmp_path / name) for name in ("resident", "passing"))
    stream = streaming.begin(passing.adapted.model, stack(wanted), "cpu")
    object.__setattr__(passing.adapted, "stream", stream)
    same(resident, passing)


@pytest.mark.parametrize(
    ("architecture", "changes", "told"),
    [
        ("albert", (), "this base has no list of its 2 layers"),
        ("bert", ("method={kind: full}",), "method.kind=full trains every weight"),
        ("bert", ("method.init=loftq", "model.quantize=int8"), "method.init=loftq needs every weight twice"),
    ],
)
def test_what_cannot_pass_is_refused_before_it_is_loaded(
    architecture: str, changes: Sequence[str], told: str, bases: Bases, reviews: Path
):
    with pytest.raises(ModelError, match=f"budget.offload=layers: {told}"):
        rehearse(recipe(bases(architecture), reviews, "budget.offload=layers", *changes), device_name="cpu")


def test_a_bundle_is_the_same_and_loads_as_it_was_trained(bases: Bases, reviews: Path, tmp_path: Path):
    bundles = [
        run(recipe(deep(bases, "llama"), reviews, f"budget.offload={how}"), tmp_path / how, device_name="cpu")
        for how in ("none", "layers")
    ]
    resident, passing = ((one.folder / "adapter_model.safetensors").read_bytes() for one in bundles)
    assert resident == passing
    assert bundles[1].passport.plan.offload == "layers"
    adapted, plan = bundles[1].load(device.find("cpu"))
    assert plan.offload == "layers"
    assert adapted.stream is not None
    assert bundles[1].verify(device.find("cpu")).exact


def test_the_plan_lets_layers_pass_where_nothing_else_fits(bases: Bases, reviews: Path, tmp_path: Path):
    wanted = recipe(deep(bases, "bert", hidden_size=256, intermediate_size=1024), reviews)
    base = model_base(wanted)
    profile = profiles.profile(base, wanted.task)
    first = plans.make(wanted, profile, device.find("cpu"))
    *others, last = budget.plans(wanted, first, profile)
    assert {one.offload for one in others} == {"none"}
    assert last.offload == "layers"
    assert others[-1].model_copy(update={"offload": "layers"}) == last
    (plain, _), (passing, account) = (memory.estimate(wanted, base, profile, one) for one in (others[-1], last))
    layer = account.held.passing // 5
    assert layer == 2 * 256 * 1024 * 4 + 4 * 256 * 256 * 4
    assert plain.linears - passing.linears == 3 * layer
    assert plain.total > passing.total
    found = budget.settle(
        wanted, first, profile, passing.total, lambda one, by: memory.estimate(one, base, profile, by)[0].total
    )
    assert found == last


def test_the_memory_told_is_that_of_two_layers(bases: Bases, reviews: Path, tmp_path: Path):
    """The blocks of a loaded model hold what the account says that passes."""
    wanted = recipe(deep(bases, "llama", **WIDE["llama"]), reviews, "model.quantize=nf4", "budget.offload=layers")
    passing = prepare(wanted, tmp_path)
    base = model_base(wanted)
    account = simulate.account(wanted, base, profiles.profile(base, wanted.task), passing.plan, 2, 8)
    assert account.held.passing == sum(streaming.layer_bytes(passing.adapted.model, stack(wanted)))
