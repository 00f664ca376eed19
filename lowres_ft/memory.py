"""What a run needs of memory, term by term, told before a weight is read.

What tensors take follows from an account of a step (`simulate`). What a process takes beside them, its libraries and
what the allocator cannot give back, was fitted to measured peaks by `python -m benchmarks.fit`; `python -m
benchmarks.probe` tells how far both lie apart.
"""

import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from lowres_ft import allocator, device, limits, simulate, tables
from lowres_ft.bases import Base
from lowres_ft.least import FILE_ELEMENT
from lowres_ft.ledger import Kind
from lowres_ft.pace import Shape
from lowres_ft.plan import Plan
from lowres_ft.profiles import Profile
from lowres_ft.recipe import Recipe
from lowres_ft.simulate import Account, Held, Pass
from lowres_ft.spec import Spec

_MAPPED_FROM = {"bound": allocator.MAPPED, "mapped": allocator.HUGE}  # bytes of a tensor that lies in no heap
_HOLES = 3  # beside each layer's input that is kept in the heap, of its size: malloc_info (glibc 2.36) shows them


class Fitted(Spec):
    """What a process takes beside its tensors, fitted on one kind of device."""

    libraries: int
    """Bytes that imported libraries with a model's code and a tokenizer take, or a GPU's context."""
    sixteen: int
    """Bytes more where 16 bits compute: kernels that are made for each shape, and what they work with."""
    fragmentation: float
    """Bytes that the heap keeps in pieces for each byte that a micro-batch has there."""
    growth: float | None = None
    """Which share of what is kept so (`Memory.allocator`) comes after a run's probe; None where that is not known."""

    @classmethod
    def of(cls, kind: str) -> "Fitted":
        """Those of a kind of heap (`heap`), or of a GPU (`cuda`)."""
        return cls.model_validate(tables.read("memory")[kind])


@dataclass(frozen=True)
class Memory:
    """Bytes of a run at its peak, by what they are for."""

    libraries: int
    """Imported code, a GPU's context, a tokenizer."""
    linears: int
    """Frozen linear layers: codes with their scales where they are quantized."""
    embeddings: int
    others: int
    """Norms, positions, buffers."""
    heads: int
    adapter: int
    gradients: int
    optimizer: int
    best: int
    """A copy of what is trained, at the best evaluation."""
    activations: int
    """What the forward pass keeps for the backward pass."""
    logits: int
    work: int
    """What the backward pass makes for a moment."""
    converted: int
    """Slices of quantized weights in the dtype that computes."""
    allocator: int
    """Memory in pieces, which cannot be given back."""
    holes: int
    """Room in the heap between the inputs of layers that are computed again, too small for what is asked next."""
    loading: int
    """The whole peak while weights are read, which may be higher than all of the above."""
    later: int | None = None
    """What a run takes that its probe has not seen: the copy of the best step, and what its heap grows by. It is part
    of the above. None where that is not known."""

    @cached_property
    def terms(self) -> dict[str, int]:
        """What adds up to the peak of training."""
        return {name: size for name, size in asdict(self).items() if name not in ("loading", "later")}

    @property
    def total(self) -> int:
        """The peak of the whole run."""
        return max(self.loading, sum(self.terms.values()))

    def to_json(self) -> dict[str, Any]:
        """All terms and the total."""
        return {"total": self.total, **asdict(self)}


def full(recipe: Recipe, plan: Plan) -> Iterator[Shape]:
    """Yield the micro-batches (sequences, tokens of each) of sequences as long as the recipe lets them be.

    Where a longer one takes another kernel of attention, the longest of each kernel counts: one that keeps nothing can
    take less.
    """
    most = recipe.task.max_length
    share = -(-recipe.train.batch_size // plan.processes)
    for width in sorted({most, *(length for length in plan.attention_kernels if length < most)}, reverse=True):
        yield max(1, min(share, plan.micro_batch_tokens // width)), width


def heaviest(shapes: Sequence[Shape], plan: Plan) -> list[Shape]:
    """Of each kernel of attention the micro-batch with most tokens."""
    ends = sorted(plan.attention_kernels)
    found: dict[int, Shape] = {}
    for shape in sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape[1])):
        found[bisect_left(ends, shape[1])] = shape
    return list(found.values())


def estimate(
    recipe: Recipe,
    base: Base,
    profile: Profile,
    plan: Plan,
    shapes: Sequence[Shape] = (),
    *,
    goes_on: bool = True,
) -> tuple[Memory, Account]:
    """What a run needs at its peak, and the account of the micro-batch that needs most.

    Without the `shapes` of a run's micro-batches they are as large as the recipe lets them be. A run that `goes_on`
    after an evaluation does so beside a copy of its best tensors; where there is but one, at the end, no step does.

    Raises:
        ModelError: The base cannot be adapted as asked.
    """
    several = heaviest(shapes, plan) if shapes else list(full(recipe, plan))
    accounts = simulate.accounts(recipe, base, profile, plan, several)
    account = max(accounts, key=lambda one: one.peak.bytes)
    kind = heap(recipe, profile, plan)
    fitted = Fitted.of(kind)
    sixteen = 0 if plan.dtype == "float32" else fitted.sixteen
    in_pieces = sixteen + fitted.fragmentation * in_heap(account, kind, shapes)
    holes = _HOLES * kept_in_heap(account, profile, plan, kind)
    moments = [(account.held, account.peak)]
    if not goes_on:  # the copy is made once the evaluation has ended
        gradients: dict[Kind, float] = {"gradients": account.evaluation.most.get("gradients", 0)}
        moments = [(replace(account.held, best=0), account.peak), (account.held, Pass(gradients, {}))]
    held, peak = max(moments, key=lambda moment: moment[0].total + moment[1].bytes)
    return _memory(held, peak, fitted, in_pieces, holes), account


def basis() -> list[Any]:
    """What decides, beside a run and its plan, on what is told; plain values, by which a kept answer is known."""
    fitted = tables.read("memory"), tables.read("speed")
    return [list(Memory.__dataclass_fields__), *fitted, allocator.sets_aside(), device.versions()]


def heap(recipe: Recipe, profile: Profile, plan: Plan) -> str:
    """Which kind of heap a run has.

    Of a `bound` process small tensors lie there alone. In that of a command (`heap`) all do, and in a program in which
    malloc sets small blocks aside (`heap-aside`), unless large ones are `mapped`. A GPU has none (`cuda`), and other
    devices are taken to be like it.
    """
    if plan.device != "cpu":
        return "cuda"
    if limits.tightens(recipe, plan.device):
        return "bound"
    if allocator.maps(profile.hidden):
        return "mapped"
    return "heap-aside" if allocator.sets_aside() else "heap"


def in_heap(account: Account, kind: str, shapes: Sequence[Shape]) -> float:
    """Most bytes that a micro-batch of some shapes has in a kind of heap at its peak.

    Where large tensors are mapped, a smaller micro-batch may have more there than the one that takes most of all.
    """
    limit = _MAPPED_FROM.get(kind, sys.maxsize)
    whole = account.rows * account.width
    shares = {1.0, *(min(1.0, rows * width / whole) for rows, width in shapes)}
    return max(account.peak.small(limit, share) for share in shares)


def kept_in_heap(account: Account, profile: Profile, plan: Plan, kind: str) -> float:
    """Bytes in a kind of heap of layers' inputs, where layers are computed again and all else of them is freed at once.

    A GPU's allocator has its own ways.
    """
    size = account.rows * account.width * profile.hidden * getattr(torch, plan.dtype).itemsize
    if kind == "cuda" or plan.recompute != "layers" or size >= _MAPPED_FROM.get(kind, sys.maxsize):
        return 0.0
    return account.training.most.get("activations", 0.0)


def _memory(held: Held, peak: Pass, fitted: Fitted, in_pieces: float, holes: float) -> Memory:
    kept = held.linears + held.embeddings + held.others + held.heads + held.adapter
    return Memory(
        libraries=fitted.libraries,
        linears=held.linears,
        embeddings=held.embeddings,
        others=held.others,
        heads=held.heads,
        adapter=held.adapter,
        optimizer=held.optimizer,
        best=held.best,
        gradients=round(peak.most.get("gradients", 0)),
        activations=round(peak.most.get("activations", 0)),
        logits=round(peak.most.get("logits", 0)),
        work=round(peak.most.get("work", 0)),
        converted=round(peak.most.get("converted", 0)),
        allocator=round(in_pieces),
        holes=round(holes),
        loading=fitted.libraries + kept + FILE_ELEMENT * held.largest,
        later=None if fitted.growth is None else held.best + round(fitted.growth * in_pieces),
    )
