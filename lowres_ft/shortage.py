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
from lowres_ft.errors import OutOfMemoryError, first_line
from lowres_ft.plan import Plan

T = TypeVar("T")
_SAID = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"
    r"|MPS backend out of memory|std::bad_alloc|can't start new thread"
    r"|unable to mmap .*Cannot allocate memory"
    r"|could not create an? (primitive(?! descriptor)|memory|engine)"  # of a descriptor it says what is not supported
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
    return _origin(error) is not None


def said(error: BaseException) -> str:
    """What the library that ran out of memory says of it, in a line; empty where it says nothing."""
    origin = _origin(error)
    return first_line(origin) if origin is not None and str(origin) else ""


def exhausted(what: str, said: str, *, hint: str = "") -> OutOfMemoryError:
    """The error that memory ran out at something, and what a library said of it."""
    return OutOfMemoryError(f"memory ran out: {what}" + (f" ({said})" if said else ""), hint=hint)


def _origin(error: BaseException | None) -> BaseException | None:
    """The error that says that memory could not be had: a given one, or one that it came from."""
    if error is None or isinstance(error, MemoryError | torch.OutOfMemoryError):
        return error
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return error
    told = isinstance(error, RuntimeError) and _SAID.search(str(error)) is not None
    return error if told else _origin(error.__cause__)


def release(device: str) -> None:
    """Give back what nothing holds any more. To be called after the handler, whose error holds frames and tensors."""
    limits.trim()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def twice(make: Callable[[], T], device: str, what: str = "loading") -> T:
    """What `make` gives; where memory runs out, what it gives once everything that it had made is released.

    `what` says in an error what ran out of it.

    Raises:
        OutOfMemoryError: It ran out again.
    """
    try:
        return make()
    except Exception as error:
        if not ran_out(error):
            raise
    release(device)
    with named(what):
        return make()


@contextmanager
def named(what: str) -> Iterator[None]:
    """Turn running out of memory inside into an OutOfMemoryError that says at what."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemoryError) or not ran_out(error):
            raise
        told = said(error)
    else:
        return
    raise exhausted(what, told)
