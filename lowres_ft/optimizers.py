"""Optimizers: AdamW of PyTorch or in 8 bits, with weight decay for matrices alone."""

from collections.abc import Iterable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from lowres_ft import libraries
from lowres_ft.errors import TrainingError
from lowres_ft.model import Adapted
from lowres_ft.parts import TrainSpec
from lowres_ft.plan import Plan

_BETAS = (0.9, 0.999)
_KERNEL = "bitsandbytes::optimizer_update_8bit_blockwise"


def require(spec: TrainSpec, device: str) -> None:
    """Refuse, before a weight is read, an optimizer that a device cannot run.

    Raises:
        TrainingError: bitsandbytes is not there, or has no such optimizer for it.
    """
    if spec.optimizer == "adamw":
        return
    kind, why = torch.device(device).type, "which is not installed"
    try:
        libraries.bitsandbytes()
        why = f"whose version {metadata.version('bitsandbytes')} does not have it for {kind}"
        known = torch._C._dispatch_has_kernel_for_dispatch_key(_KERNEL, kind.upper())  # noqa: SLF001
    except (ImportError, RuntimeError):
        known = False
    if not known:
        told = f"train.optimizer={spec.optimizer} needs bitsandbytes, {why}"
        raise TrainingError(told, hint="Use train.optimizer=adamw.")


def make(adapted: Adapted, spec: TrainSpec, plan: Plan) -> torch.optim.Optimizer:
    """The optimizer of the trained parameters, its state at zero."""
    groups = _groups(adapted, spec)
    if spec.optimizer == "adamw":
        return _with_state(torch.optim.AdamW(groups, lr=0.0, betas=_BETAS, fused=plan.fused_optimizer))
    found = libraries.bitsandbytes().optim.AdamW8bit(groups, lr=0.0, betas=_BETAS)
    for at, group in enumerate(found.param_groups):
        for index, parameter in enumerate(group["params"]):
            found.init_state(group, parameter, at, index)
    optimizer: torch.optim.Optimizer = found
    return optimizer


def _with_state(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer with its state: made by a step at rate 0, so that no step of a run has to find memory for it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    rewind(optimizer, optimizer.param_groups, 0)
    return optimizer


def step(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """Take a step with the parameters of one group alone, so that it is known which are done when memory runs out."""
    groups = optimizer.param_groups
    optimizer.param_groups = [group]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups


def rewind(optimizer: torch.optim.Optimizer, groups: Iterable[dict[str, Any]], step: int) -> None:
    """Let some groups of an optimizer have taken so many steps; their moments stay."""
    for own in (optimizer.state[parameter] for group in groups for parameter in group["params"]):
        if isinstance(own["step"], Tensor):
            own["step"].fill_(step)
        else:
            own["step"] = step


def _groups(adapted: Adapted, spec: TrainSpec) -> list[dict[str, Any]]:
    """The trained parameters by weight decay, which is for matrices alone, and by their rate over the recipe's."""
    groups: dict[tuple[bool, float], list[Tensor]] = {}
    for name, parameter in adapted.trained().items():
        vector = max(parameter.shape) == parameter.numel()
        groups.setdefault((vector, adapted.method.rate(name)), []).append(parameter)
    return [
        {"params": groups[vector, rate], "weight_decay": 0.0 if vector else spec.weight_decay, "rate": rate}
        for vector, rate in sorted(groups)
    ]
