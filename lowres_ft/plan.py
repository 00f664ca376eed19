"""Plan: how this machine runs a recipe. Nothing in it changes the result beyond rounding."""

from typing import Literal

from lowres_ft.device import Dtype, Machine
from lowres_ft.profiles import Profile
from lowres_ft.recipe import Recipe
from lowres_ft.spec import Spec

_TOKENS = {"cpu": 2048, "mps": 8192, "cuda": 16384}
_LOGITS = {"cpu": 2**27, "mps": 2**27, "cuda": 2**29}
"""Tokens x vocabulary that stand in memory whole at the most: in fp32 half a GiB or two, and their gradient as much."""
_EAGER_UP_TO = 128  # tokens; below, plain products beat the fused attention's backward pass on a processor


class Plan(Spec):
    """The resolved plan of a run, as it is written into the run folder before the first step."""

    device: str
    """'cpu', 'cuda', 'cuda:1' or 'mps'."""
    dtype: Dtype
    """What computes; frozen weights are held in it."""
    threads: int
    """Threads of a product; the same result to the last bit needs the same number."""
    processes: int
    """Processes that share each step."""
    micro_batch_tokens: int
    """Padded tokens that pass forward and backward at once; one text may be longer."""
    evaluation_tokens: int
    """Padded tokens that pass forward at once when nothing is kept for a backward pass."""
    attention: Literal["eager", "sdpa"]
    """Implementation of attention in transformers."""
    fused_optimizer: bool
    """AdamW in one kernel."""
    packing: bool
    """Several sequences share a row of a micro-batch, without seeing each other."""
    pinned_cut: bool
    """True where dropout inside the base ties the result to this very cut."""


def make(recipe: Recipe, profile: Profile, machine: Machine) -> Plan:
    """Decide how a machine runs a recipe."""
    tokens = _TOKENS[machine.kind]
    short = machine.kind == "cpu" and recipe.task.max_length <= _EAGER_UP_TO
    return Plan(
        device=machine.device,
        dtype=machine.dtype if recipe.model.dtype == "auto" else recipe.model.dtype,
        threads=machine.threads,
        processes=machine.processes,
        micro_batch_tokens=tokens,
        evaluation_tokens=2 * tokens,
        attention="eager" if short or not profile.fused_attention else "sdpa",
        fused_optimizer=machine.kind != "mps",
        packing=False,  # steps of like lengths hold little padding, and a mask costs more than it
        pinned_cut=recipe.model.dropout > 0,
    )


def for_whole_logits(plan: Plan, vocabulary: int) -> Plan:
    """The plan for a model that writes whose logits, tokens x vocabulary, all stand in memory."""
    most = _LOGITS[plan.device.partition(":")[0]] // max(1, vocabulary)
    tokens = {name: min(most, getattr(plan, name)) for name in ("micro_batch_tokens", "evaluation_tokens")}
    return plan.model_copy(update=tokens)
