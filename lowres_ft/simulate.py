"""A step without memory: a run's own code on fake tensors, and an account of what would be alive and computed.

No weight is read. The model is built from its config, its weights take the form that the recipe asks for, adapters are
put in, and one micro-batch passes forward and backward under a ledger. So each architecture, attention kernel, method
and way of recomputation is accounted for by what it does, and not by a formula that it would have to be known by.

Layers of a stack are alike, so of a deep one 2 and 4 layers are run, and the rest follows: what is alive at the peak
is a sum of what each layer keeps and of what one of them needs for a moment.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from lowres_ft import model, profiles, quantize, reading, streaming
from lowres_ft.bases import Base
from lowres_ft.ledger import Cost, Kind, Ledger, nbytes
from lowres_ft.linear import AdaptedLinear, LowRankLinear
from lowres_ft.model import Adapted
from lowres_ft.plan import Plan
from lowres_ft.profiles import Profile
from lowres_ft.recipe import Recipe
from lowres_ft.storage import Storage
from lowres_ft.tasks.base import Batch

Key = TypeVar("Key")
_FEW, _MORE = 2, 4  # layers of a deep stack that are run
_SAME = 0.001  # of a peak: what may go from one kind to another where the peaks are the same moment
_OPTIMIZER_BLOCK = 256  # moments in 8 bits that share an absolute maximum
_IN_8_BITS = 4096  # weights from which a tensor's moments are


@dataclass(frozen=True)
class Held:
    """Bytes that are held from the first step to the last."""

    linears: int
    """Of the frozen linear layers: codes and scales where they are quantized."""
    embeddings: int
    """Of words, and a frozen output layer that is not the same."""
    others: int
    """Norms, biases, positions, buffers."""
    heads: int
    """Trained whole, in fp32; of full fine-tuning all weights are."""
    adapter: int
    optimizer: int
    best: int
    """A copy of what is trained, as it was at the best evaluation so far."""
    largest: int
    """Elements of the largest tensor."""
    passing: int = 0
    """Of layers that pass through room for two of them, of which `linears` counts the room alone."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.linears + self.embeddings + self.others + self.heads + self.adapter + self.optimizer + self.best


@dataclass(frozen=True)
class Pass:
    """What one micro-batch takes."""

    most: dict[Kind, float]
    """Bytes by what they are for, at the moment when they are most."""
    costs: dict[Cost, float]
    """How often each cost of an operation occurs."""
    blocks: dict[int, float] = field(default_factory=dict)
    """Bytes at that moment by the size of what holds them."""

    @property
    def bytes(self) -> float:
        """All that is alive at that moment."""
        return sum(self.most.values())

    def small(self, limit: int, share: float = 1.0) -> float:
        """What a micro-batch with a share of the tokens has in blocks below a limit."""
        return sum(share * held for size, held in self.blocks.items() if share * size < limit)


@dataclass(frozen=True)
class Account:
    """What a run holds and does."""

    rows: int
    width: int
    held: Held
    training: Pass
    """A micro-batch of training, `rows` sequences of `width` tokens."""
    evaluation: Pass
    """One of evaluation, twice as many."""

    @property
    def peak(self) -> Pass:
        """The one of the two that takes more."""
        return max(self.training, self.evaluation, key=lambda one: one.bytes)


def account(recipe: Recipe, base: Base, profile: Profile, plan: Plan, rows: int, width: int) -> Account:
    """Account for micro-batches of `rows` sequences of `width` tokens, twice as many rows in evaluation.

    Raises:
        ModelError: The base cannot be adapted as asked.
    """
    return accounts(recipe, base, profile, plan, [(rows, width)])[0]


def accounts(
    recipe: Recipe, base: Base, profile: Profile, plan: Plan, shapes: Sequence[tuple[int, int]]
) -> list[Account]:
    """Account for micro-batches of some shapes, as `account` does for one, by a model that is made once."""
    if recipe.model.quantize != "none":
        quantize.require_library(recipe.model.quantize)
        quantize.require_widths(profile, recipe.model.quantize)
    deep = profile.stack is not None and profile.layers > _MORE + 2
    holding, found = _run(recipe, base, profile, plan, shapes, (_MORE, _FEW) if deep else (profile.layers,))
    accounts = []
    for shape, (done, *fewer) in zip(shapes, found, strict=True):
        passes: Sequence[Pass | None] = done
        if fewer:
            passes = [_extended(more, few, profile.layers) for more, few in zip(done, *fewer, strict=True)]
        training, evaluation = passes
        if training is None or evaluation is None:
            _, [[(training, evaluation)]] = _run(recipe, base, profile, plan, [shape], (profile.layers,))
        accounts.append(Account(*shape, holding, training, evaluation))
    return accounts


def _run(
    recipe: Recipe, base: Base, profile: Profile, plan: Plan, shapes: Sequence[tuple[int, int]], depths: Sequence[int]
) -> tuple[Held, list[list[tuple[Pass, Pass]]]]:
    """What a model holds, and for each shape its passes with so many layers each, which become fewer."""
    ledger, share = Ledger(), -(-recipe.train.batch_size // plan.processes)
    found: list[list[tuple[Pass, Pass]]] = [[] for _ in shapes]
    with FakeTensorMode(allow_non_fake_inputs=True), ledger:
        adapted = _adapted(recipe, base, profile, plan)
        holding = held(adapted, recipe)
        if plan.offload == "layers" and profile.stack is not None:
            holding = _passing(holding, adapted.model, profile.stack, plan)
        for depth in depths:
            if depth < profile.layers and profile.stack is not None:
                stack = adapted.model.get_submodule(profile.stack)
                assert isinstance(stack, nn.ModuleList)
                del stack[depth:]
            for (rows, width), passes in zip(shapes, found, strict=True):
                training = _training(adapted, ledger, rows, width, cut=rows < share)
                passes.append((training, _evaluation(adapted, ledger, 2 * rows, width)))
    return holding, found


def _extended(more: Pass, fewer: Pass, layers: int) -> Pass | None:
    """What passes of `_MORE` and `_FEW` layers come to with all layers; None where their peaks are of two kinds."""
    times = (layers - _MORE) / (_MORE - _FEW)
    growth: dict[Kind, float] = {kind: more.most.get(kind, 0) - fewer.most.get(kind, 0) for kind in more.most}
    if any(grown < -_SAME * more.bytes for grown in growth.values()) or fewer.most.keys() - more.most.keys():
        return None
    most = {kind: size + times * growth[kind] for kind, size in more.most.items()}
    return Pass(most, _grown(more.costs, fewer.costs, times), _grown(more.blocks, fewer.blocks, times))


def _grown(more: dict[Key, float], fewer: dict[Key, float], times: float) -> dict[Key, float]:
    """What more has, and so many times what it has more than fewer."""
    keys = more.keys() | fewer.keys()
    return {key: (1 + times) * more.get(key, 0) - times * fewer.get(key, 0) for key in keys}


def _adapted(recipe: Recipe, base: Base, profile: Profile, plan: Plan) -> Adapted:
    """The model of a run, its weights fake, in the form in which they would be held; its layers stay where they are."""
    plan = plan.model_copy(update={"offload": "none"})
    task, method = recipe.task, recipe.method
    config = profiles.config(base, task)
    if not task.generates and hasattr(config.get_text_config(), "use_cache"):
        config.get_text_config().use_cache = False
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = config.pad_token_id = 0
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the files hold what `_quantize` makes room for
    dtype = torch.float32 if method.trains_base else getattr(torch, plan.dtype)
    with profiles.quiet(), no_init_weights():
        made = profiles.auto_class(task).from_config(
            config, dtype=dtype, attn_implementation=model.attention_name(plan), trust_remote_code=False
        )
    if recipe.model.quantize != "none":
        for name, form in reading.forms(made, recipe.model, profile.outside).items():
            module = made.get_submodule(name)
            room = quantize.empty(reading.shape(module), form, torch.device("cpu"))
            module.weight = quantize.parameter(room)
    made.tie_weights()
    init = getattr(method, "init", "default")
    if init != "default":  # it is found by factorizing weights, which there are none of
        recipe = recipe.model_copy(update={"method": method.model_copy(update={"init": "default"})})
    adapted = model.adapt(recipe, base, profile, plan, model.Loaded(made, None, profile.heads))
    if init == "pissa":
        for layer in adapted.model.modules():
            if isinstance(layer, LowRankLinear):
                layer.take_back()
    return adapted


def held(adapted: Adapted, recipe: Recipe) -> Held:
    """What a model that is ready to train holds, real or fake, and what its optimizer will."""
    whole = adapted.method.trains_base
    sums: Counter[str] = Counter()
    largest, seen = 0, set()
    words = _words(adapted.model)
    for name, tensor in itertools.chain(adapted.model.named_parameters(), adapted.model.named_buffers()):
        if (key := tensor.untyped_storage()._cdata) in seen:  # noqa: SLF001
            continue
        seen.add(key)
        largest = max(largest, tensor.numel())
        sums[_part(name, tensor, adapted, words)] += tensor.untyped_storage().nbytes()
    trained = list(adapted.trained().values())
    return Held(
        linears=sums["linears"],
        embeddings=sums["embeddings"],
        others=sums["others"],
        heads=0 if whole else sums["heads"],
        adapter=sums["adapter"],
        optimizer=sum(_moments(tensor.numel(), recipe.train.optimizer) for tensor in trained),
        best=sum(map(nbytes, adapted.tensors().values())) if recipe.data.validation is not None else 0,
        largest=largest,
    )


def _passing(holding: Held, model: PreTrainedModel, stack: str, plan: Plan) -> Held:
    """What is held where the layers of a stack pass; beside a GPU, words may stay in the machine's memory."""
    layers = streaming.layer_bytes(model, stack)
    name = None if plan.device == "cpu" else streaming.words_apart(model)
    words = [] if name is None else model.get_submodule(name).state_dict().values()
    return replace(
        holding,
        linears=max(0, holding.linears - sum(sorted(layers)[:-2])),
        embeddings=max(0, holding.embeddings - sum(map(nbytes, words))),
        passing=sum(layers),
    )


def _words(model: PreTrainedModel) -> set[int]:
    """Modules that hold the embedding of words and the output layer, by their identity, and all inside them."""
    found = (model.get_input_embeddings(), model.get_output_embeddings())
    return {id(inner) for module in found if module is not None for inner in module.modules()}


def _part(name: str, tensor: Tensor, adapted: Adapted, words: set[int]) -> str:
    """Which part of `Held` a tensor belongs to."""
    module = adapted.model.get_submodule(name.rpartition(".")[0])
    if any(name.startswith(f"{head}.") for head in adapted.heads):
        return "linears" if adapted.method.trains_base else "heads"
    if id(module) in words:
        return "embeddings"
    if isinstance(module, AdaptedLinear) and name.rpartition(".")[2] != "bias":
        return "adapter"
    return "linears" if isinstance(module, Storage | nn.Linear | Conv1D | AdaptedLinear) else "others"


def _moments(count: int, optimizer: str) -> int:
    """Bytes that AdamW holds of a tensor of `count` weights: two moments in fp32, or in 8 bits with their maxima."""
    if optimizer == "adamw8bit" and count >= _IN_8_BITS:
        return 2 * (count + 4 * -(-count // _OPTIMIZER_BLOCK))
    return 8 * count


def _training(adapted: Adapted, ledger: Ledger, rows: int, width: int, *, cut: bool) -> Pass:
    """A micro-batch forward and backward; where a step is `cut`, the gradients of others are there before."""
    trained = list(adapted.trained().values())
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: ledger.call(p.grad, "gradients"))  # type: ignore[no-untyped-call]
        for p in trained
    ]
    batch = _batch(adapted, rows, width)
    with ledger.counted():
        with ledger.during("gradients"):
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter) if cut else None
        adapted.keys.set(0, batch.rows, width, None)
        with ledger.during("activations"), _told_apart(adapted.model, ledger), adapted.computing():
            loss = adapted.task.loss(adapted.model, batch)
        with ledger.during("work"):
            loss.backward()  # type: ignore[no-untyped-call]
        adapted.keys.clear()
        found = Pass(dict(ledger.most), dict(ledger.costs), dict(ledger.blocks))
        del loss
        for parameter in trained:
            parameter.grad = None
    for hook in hooks:
        hook.remove()
    return found


def _evaluation(adapted: Adapted, ledger: Ledger, rows: int, width: int) -> Pass:
    """A micro-batch of evaluation, beside the gradients that the last step left."""
    was_training = adapted.model.training
    adapted.model.eval()
    batch = _batch(adapted, rows, width)
    with ledger.counted(), torch.no_grad(), adapted.computing():  # inference mode would hide products
        left: dict[Kind, float] = {"gradients": sum(map(nbytes, adapted.trained().values()))}
        with ledger.during("activations"), _told_apart(adapted.model, ledger):
            adapted.task.outputs(adapted.model, batch)
        found = Pass({**ledger.most, **left}, dict(ledger.costs), dict(ledger.blocks))
    adapted.model.train(was_training)
    return found


@contextmanager
def _told_apart(model: PreTrainedModel, ledger: Ledger) -> Iterator[None]:
    """Call what is made after the base logits."""

    def after(*_: Any) -> None:
        ledger.kind = "logits"

    hook = model.base_model.register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()


def _batch(adapted: Adapted, rows: int, width: int) -> Batch:
    """Rows without padding whose tokens all count."""
    task = adapted.task
    depth = width if task.peft_type != "SEQ_CLS" else len(task.names) if getattr(task, "multi_label", False) else 1
    ids, targets = (torch.zeros(rows, size, dtype=torch.long) for size in (width, depth))
    return Batch(ids, torch.ones_like(ids), targets, torch.zeros(rows, dtype=torch.long))
