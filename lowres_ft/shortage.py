"""Running out of memory: how libraries say it, and how many tokens turned out to fit.

A step that does not fit is done again in smaller micro-batches, a batch of an evaluation in halves. Neither changes a
result beyond rounding, so a run goes on; what did not fit once is not tried again.
"""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from lowres_ft import limits
from lowres_ft.errors import OutOfMemoryError
from lowres_ft.plan import Plan

T = TypeVar("T")
_SAID = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"
    r"|MPS backend out of memory|std::bad_alloc|can't start new thread|could not create a (primitive|memory|engine)"
)


@dataclass
class Room:
    """Padded tokens that fit at once, as a run found out; None while what its plan says does."""

    training: int | None = None
    evaluation: int | None = None
    told: list[str] = field(default_factory=list)
    """The first time that each was found out, in words."""

    def found(self, plan: Plan) -> str:
        """What differs from a plan in the end, in words; empty where nothing does."""
        parts = {"micro-batches": self.training, "batches of an evaluation": self.evaluation}
        first = {"micro-batches": plan.micro_batch_tokens, "batches of an evaluation": plan.evaluation_tokens}
        found = [f"{what} had {size:,} tokens in the end, not {first[what]:,}" for what, size in parts.items() if size]
        return f"memory ran out: {' and '.join(found)}" if found else ""

    def shrink_training(self, tokens: int, step: int) -> None:
        """Let micro-batches have so many tokens from a step (from 1) on, which is done again."""
        if self.training is None:
            self.told.append(f"memory ran out in step {step:,}: micro-batches of {tokens:,} tokens from there on")
        self.training = tokens

    def shrink_evaluation(self, tokens: int) -> None:
        """Let batches of an evaluation have so many tokens."""
        if self.evaluation is None:
            self.told.append(f"memory ran out in an evaluation: batches of {tokens:,} tokens from there on")
        self.evaluation = tokens


def ran_out(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that memory could not be had."""
    if error is None:
        return False
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    said = isinstance(error, RuntimeError) and _SAID.search(str(error)) is not None
    return said or ran_out(error.__cause__)


def release(device: str) -> None:
    """Give back what nothing holds any more. To be called after the handler, whose error holds frames and tensors."""
    limits.trim()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def twice(make: Callable[[], T], device: str) -> T:
    """What `make` gives; where memory runs out, what it gives once everything that it had made is released.

    Raises:
        OutOfMemoryError: It ran out again.
    """
    try:
        return make()
    except Exception as error:
        if not ran_out(error):
            raise
    release(device)
    with named("loading"):
        return make()


@contextmanager
def named(what: str) -> Iterator[None]:
    """Turn running out of memory inside into an OutOfMemoryError that says at what."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemoryError) or not ran_out(error):
            raise
    else:
        return
    raise OutOfMemoryError(f"memory ran out: {what}")
