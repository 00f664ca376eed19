"""Plan: how this machine runs a recipe. Nothing in it changes the result beyond rounding."""

from typing import Literal

from lowres_ft.device import Dtype, Machine
from lowres_ft.errors import ModelError
from lowres_ft.profiles import Profile
from lowres_ft.recipe import Recipe
from lowres_ft.spec import Spec

_TOKENS = {"cpu": 2048, "mps": 8192, "cuda": 16384}
_LOGITS = {"cpu": 2**27, "mps": 2**27, "cuda": 2**29}
"""Tokens x vocabulary that a model that writes passes at once: in fp32 half a GiB or two, and its gradient as much."""
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
    recompute: Literal["none", "layers", "selective"]
    """Which activations are computed again in the backward pass."""
    int8: Literal["dequantize", "triton"]
    """What multiplies by int8 codes: PyTorch, with codes converted in slices; or, on a GPU, a kernel of ours."""
    fused_optimizer: bool
    """AdamW in one kernel."""
    pinned_cut: bool
    """True where dropout inside the base ties the result to this very cut."""


def make(recipe: Recipe, profile: Profile, machine: Machine) -> Plan:
    """Decide how a machine runs a recipe.

    Raises:
        ModelError: It cannot run as its budget says.
    """
    recompute = recipe.budget.recompute
    if recompute not in ("auto", "none") and profile.stack is None:
        raise ModelError(
            f"budget.recompute={recompute}: this base has no list of its {profile.layers} layers",
            hint="Use budget.recompute=none.",
        )
    tokens = _TOKENS[machine.kind]
    most = _LOGITS[machine.kind] // max(1, profile.vocabulary) if recipe.task.generates else 2 * tokens
    short = machine.kind == "cpu" and recipe.task.max_length <= _EAGER_UP_TO
    return Plan(
        device=machine.device,
        dtype=machine.dtype if recipe.model.dtype == "auto" else recipe.model.dtype,
        threads=machine.threads,
        processes=machine.processes,
        micro_batch_tokens=min(tokens, most),
        evaluation_tokens=min(2 * tokens, most),
        attention="eager" if short or not profile.fused_attention else "sdpa",
        recompute="none" if recompute == "auto" else recompute,
        int8="dequantize",  # until the other is measured on a GPU
        fused_optimizer=machine.kind != "mps",
        pinned_cut=recipe.model.dropout > 0,
    )
