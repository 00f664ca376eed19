"""Plan: how this machine runs a recipe. Nothing in it changes the result beyond rounding."""

from typing import Literal

import torch

from lowres_ft import attention, mapped, timings
from lowres_ft.attention import Heads, Kernel
from lowres_ft.device import Dtype, Machine
from lowres_ft.errors import ModelError
from lowres_ft.profiles import Profile
from lowres_ft.recipe import Recipe
from lowres_ft.spec import Spec

_TOKENS = {"cpu": 2048, "mps": 8192, "cuda": 16384}
_WRITER_TOKENS = {"cpu": 1024, "mps": 2048, "cuda": 4096}
"""Of models that write: their modules keep 1.3 MB a token (SmolLM2), and smaller micro-batches take as long."""
_LOGITS = {"cpu": 2**27, "mps": 2**27, "cuda": 2**29}
"""Tokens x vocabulary that stand in memory whole at the most: in fp32 half a GiB or two, and their gradient as much."""


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
    attention: Literal["eager", "sdpa", "products"]
    """The model's own attention, PyTorch's fused kernel, or products with a kernel for each length."""
    attention_kernels: dict[int, Kernel]
    """Of products: the kernel for rows of up to so many tokens, as it was timed here; longer ones take the fused."""
    recompute: Literal["none", "layers", "selective"]
    """Which activations are computed again in the backward pass."""
    int8: Literal["dequantize", "triton"]
    """What multiplies by int8 codes: PyTorch, with codes converted in slices; or, on a GPU, a kernel of ours."""
    fused_optimizer: bool
    """AdamW in one kernel."""
    packing: bool
    """Several sequences share a row of a micro-batch, without seeing each other."""
    pinned_cut: bool
    """True where dropout inside the base ties the result to this very cut."""
    offload: Literal["none", "layers"] = "none"
    """Whether frozen layers lie in files, or beside a GPU, and pass through room for two of them."""


def make(recipe: Recipe, profile: Profile, machine: Machine, *, like: Plan | None = None) -> Plan:
    """Decide how a machine runs a recipe; what would be timed is as in a plan that it is to be `like`.

    Raises:
        ModelError: It cannot run as its budget says.
    """
    recompute = recipe.budget.recompute
    if recompute not in ("auto", "none") and profile.stack is None:
        raise ModelError(
            f"budget.recompute={recompute}: this base has no list of its {profile.layers} layers",
            hint="Use budget.recompute=none.",
        )
    tokens = (_WRITER_TOKENS if recipe.task.generates else _TOKENS)[machine.kind]
    dtype = machine.dtype if recipe.model.dtype == "auto" else recipe.model.dtype
    own = machine.kind == "cpu" and profile.own_attention
    kernels: dict[int, Kernel] = {}
    if own:
        same = like is not None and like.attention == "products"
        kernels = like.attention_kernels if like and same else _kernels(recipe, profile, machine, dtype, tokens)
    return Plan(
        device=machine.device,
        dtype=dtype,
        threads=machine.threads,
        processes=machine.processes,
        micro_batch_tokens=tokens,
        evaluation_tokens=2 * tokens,
        attention="products" if own else "sdpa" if profile.fused_attention else "eager",
        attention_kernels=kernels,
        recompute="none" if recompute == "auto" else recompute,
        int8="dequantize",  # until the other is measured on a GPU
        fused_optimizer=machine.kind != "mps",
        packing=False,  # steps of like lengths hold little padding, and a mask costs more than it
        pinned_cut=recipe.model.dropout > 0,
        offload=_offload(recipe, profile, machine, like),
    )


def _offload(recipe: Recipe, profile: Profile, machine: Machine, like: Plan | None) -> Literal["none", "layers"]:
    """What the recipe says of layers that pass, else what a plan says that this one is to be like."""
    wanted = recipe.budget.offload
    if wanted == "layers" and (why := why_resident(recipe, profile, machine.kind)):
        raise ModelError(f"budget.offload=layers: {why}", hint="Use budget.offload=none.")
    if wanted == "auto" and like is not None and like.device.partition(":")[0] == machine.kind:
        return "none" if why_resident(recipe, profile, machine.kind) else like.offload
    return "none" if wanted == "auto" else wanted


def why_resident(recipe: Recipe, profile: Profile, kind: str) -> str | None:
    """Why layers cannot pass through room for two of them on a kind of device; None where they can."""
    if profile.stack is None:
        return f"this base has no list of its {profile.layers} layers"
    if recipe.method.trains_base:
        return f"method.kind={recipe.method.kind} trains every weight, and layers that pass are frozen"
    if recipe.method.corrects_quantization:
        return "method.init=loftq needs every weight twice, as it is and quantized"
    if kind not in ("cpu", "cuda") or not mapped.possible():
        return "this device or system cannot give back what it read of a file"
    return None


def _kernels(recipe: Recipe, profile: Profile, machine: Machine, dtype: Dtype, tokens: int) -> dict[int, Kernel]:
    """The fastest attention for each length that the task can have."""
    heads = Heads(profile.attention_heads, profile.key_value_heads, profile.head_width)
    longest = recipe.task.max_length
    found = timings.once(
        machine,
        dtype,
        f"attention {heads} {tokens} tokens, up to {longest}",
        lambda: attention.fastest(heads, getattr(torch, dtype), longest, tokens),
    )
    return {int(length): kernel for length, kernel in found.items()}


def for_whole_logits(plan: Plan, vocabulary: int) -> Plan:
    """The plan for a model that writes whose logits, tokens x vocabulary, all stand in memory."""
    most = _LOGITS[plan.device.partition(":")[0]] // max(1, vocabulary)
    tokens = {name: min(most, getattr(plan, name)) for name in ("micro_batch_tokens", "evaluation_tokens")}
    return plan.model_copy(update=tokens)
