"""What a run needs of memory, term by term, told before a weight is read.

What tensors take follows from an account of a step (`simulate`). What a process takes beside them, its libraries and
what the allocator cannot give back, was fitted to measured peaks by `python -m benchmarks.memory`, which also tells how
far both lie apart.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from lowres_ft import simulate, tables
from lowres_ft.bases import Base
from lowres_ft.plan import Plan
from lowres_ft.profiles import Profile
from lowres_ft.recipe import Recipe
from lowres_ft.simulate import Account, Held, Pass
from lowres_ft.spec import Spec

_FILE_ELEMENT = 4  # bytes: files may hold fp32, whatever is kept of it


class Fitted(Spec):
    """What a process takes beside its tensors, fitted on one kind of device."""

    libraries: int
    """Bytes that imported libraries, or a GPU's context, take."""
    model_code: int
    """Bytes that come with the first model: its code, a tokenizer, threads and kernels."""
    allocator: int
    """Bytes that an allocator leaves in pieces as weights are made 16 bits wide, however little a step makes."""
    fragmentation: float
    """Bytes that it leaves in pieces then for each byte that a step makes; with fp32 weights it leaves next to none."""

    @classmethod
    def of(cls, kind: str) -> "Fitted":
        """Those of 'cpu' or 'cuda'; other devices are taken to be like a GPU."""
        found = tables.read("memory")
        return cls.model_validate(found.get(kind, found["cuda"]))


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
    loading: int
    """The whole peak while weights are read, which may be higher than all of the above."""

    @cached_property
    def terms(self) -> dict[str, int]:
        """What adds up to the peak of training."""
        return {name: size for name, size in asdict(self).items() if name != "loading"}

    @property
    def total(self) -> int:
        """The peak of the whole run."""
        return max(self.loading, sum(self.terms.values()))

    def to_json(self) -> dict[str, Any]:
        """All terms and the total."""
        return {"total": self.total, **asdict(self)}


def longest(recipe: Recipe, plan: Plan, lengths: Sequence[int] = ()) -> Iterator[tuple[int, int]]:
    """Yield the micro-batches (sequences, tokens of each) of which one takes most memory.

    Without `lengths` of the sequences they are as long as the recipe lets them be. Where a longer row takes another
    kernel of attention, the longest of each kernel counts: one that keeps nothing can take less.
    """
    most = min(max(lengths, default=recipe.task.max_length), recipe.task.max_length)
    share = -(-recipe.train.batch_size // plan.processes)
    for width in sorted({most, *(length for length in plan.attention_kernels if length < most)}, reverse=True):
        yield max(1, min(share, plan.micro_batch_tokens // width)), width


def estimate(
    recipe: Recipe, base: Base, profile: Profile, plan: Plan, lengths: Sequence[int] = ()
) -> tuple[Memory, Account]:
    """What a run needs at its peak, and the account of the micro-batch that needs most.

    Raises:
        ModelError: The base cannot be adapted as asked.
    """
    shapes = longest(recipe, plan, lengths)
    accounts = [simulate.account(recipe, base, profile, plan, *shape) for shape in shapes]
    account = max(accounts, key=lambda one: max(one.training.bytes, one.evaluation.bytes))
    peak = max(account.training, account.evaluation, key=lambda one: one.bytes)
    return _memory(account.held, peak, plan, single=holds_single(recipe, plan)), account


def holds_single(recipe: Recipe, plan: Plan) -> bool:
    """Whether the weights are held in fp32, as the files hold them or as all of them are trained."""
    return plan.dtype == "float32" or recipe.method.trains_base


def _memory(held: Held, peak: Pass, plan: Plan, *, single: bool) -> Memory:
    fitted = Fitted.of(plan.device.partition(":")[0])
    kept = held.linears + held.embeddings + held.others + held.heads + held.adapter
    libraries = fitted.libraries + fitted.model_code
    return Memory(
        libraries=libraries,
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
        allocator=0 if single else round(fitted.allocator + fitted.fragmentation * peak.bytes),
        loading=libraries + kept + _FILE_ELEMENT * held.largest,
    )
