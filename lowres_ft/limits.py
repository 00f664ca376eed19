"""What `budget.memory` bounds: refused early where libraries alone take more, and held to while a run goes on.

Linux has no limit of resident memory that a process may set itself; RLIMIT_DATA bounds what is mapped privately and may
be written (VmData), touched or not, and no mapped file. So a bound of `most` resident bytes becomes a soft limit of

    VmData + most - VmRSS

as both stand: what is allocated from then on may take what is left. It is worked out anew at each event of a run, as
pages of files come and go and as allocated pages are touched. A tensor that would go beyond fails in PyTorch, which a
run answers with a finer cut (`shortage`). What is limited is the process, so one limit stands at a time.

Tokenizers and the libraries of the baselines end the process where memory fails them. For them it is `lifted`; what
they keep counts afterwards.
"""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from lowres_ft import tables
from lowres_ft.errors import ModelError, OutOfMemoryError
from lowres_ft.events import Event, Listener, Note, Stage
from lowres_ft.recipe import Recipe
from lowres_ft.sizes import parse_bytes, show_bytes

_SHARE, _LEAST = 0.05, 512 * 2**20
_WARM = 2**20  # elements: enough for all threads of PyTorch to begin


def reserve(total: int) -> int:
    """Bytes of a memory of `total` that `budget.memory: auto` leaves to others."""
    return max(round(_SHARE * total), _LEAST)


def floor(device: str) -> int:
    """Bytes that the libraries of any run take on a device; where it is `auto`, on the one where they take least."""
    fitted = tables.read("memory")
    kinds = ("cpu", "cuda") if device == "auto" else ("cpu" if device == "cpu" else "cuda",)
    return min(int(fitted[kind]["libraries"]) + int(fitted[kind]["model_code"]) for kind in kinds)


def require(recipe: Recipe, device: str = "auto") -> None:
    """See, without a heavy library, that a recipe's budget holds at least what libraries take.

    Raises:
        ModelError: It does not.
    """
    given = recipe.budget.memory
    if given in (None, "auto") or parse_bytes(str(given)) >= (least := floor(device)):
        return
    raise ModelError(
        f"budget.memory: {given} is less than the {show_bytes(least)} that libraries alone take, before any weight",
        hint="Give it more; `lowres-ft plan` tells how much a run needs. Or leave it out, and there is no bound.",
    )


class Limit(Protocol):
    """A bound that a process is held to."""

    def renew(self) -> None:
        """Work it out anew from what is taken now."""

    def lift(self) -> None:
        """Let the process take what it could before, until `renew`."""


_now: Limit | None = None


@contextmanager
def held(most: int | None, device: str, listen: Listener) -> Iterator[Listener]:
    """Hold this process, or its share of a GPU, to so many bytes; yield a listener that keeps the bound true.

    Raises:
        OutOfMemoryError: It takes more already.
    """
    global _now
    limit = None if most is None else _limit(most, device)
    if limit is None:
        if most is not None:
            listen(Note("budget.memory bounds the plan alone: this system cannot hold a process to it"))
        yield listen
        return

    def heard(event: Event) -> None:
        listen(event)
        if isinstance(event, Stage):
            trim()
        limit.renew()

    _now = limit
    try:
        limit.renew()
        yield heard
    finally:
        limit.lift()
        _now = None


@contextmanager
def lifted() -> Iterator[None]:
    """Do without the bound, for libraries that cannot be told of too little memory."""
    if _now is None:
        yield
        return
    _now.lift()
    try:
        yield
    finally:
        trim()
        renew()


def renew() -> None:
    """Work out anew what is left to the process, where it is held to a bound."""
    if _now is not None:
        _now.renew()


def trim() -> None:
    """Give freed memory back to the system, as far as the C library (glibc) can."""
    gc.collect()
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def _limit(most: int, device: str) -> Limit | None:
    """What holds a process on a device to a bound; None where nothing can."""
    if device.startswith("cuda"):
        return GpuLimit(most, device)
    return DataLimit(most) if device == "cpu" and sys.platform == "linux" else None


class DataLimit:
    """RLIMIT_DATA of a process on Linux. Its own soft limit from before stays the most, and comes back."""

    def __init__(self, most: int) -> None:
        """Begin PyTorch's threads, whose stacks count.

        Raises:
            OutOfMemoryError: The process takes more already.
        """
        import torch

        torch.ones(_WARM).sum()
        trim()
        if (taken := _taken()["VmRSS"]) >= most:
            raise OutOfMemoryError(
                f"this process takes {show_bytes(taken)} before the base is loaded, and may take {show_bytes(most)}",
                hint="Give budget.memory more.",
            )
        import resource

        self.most = most
        self.before, self.hard = resource.getrlimit(resource.RLIMIT_DATA)

    def renew(self) -> None:
        """Leave to new data what resident memory leaves."""
        taken = _taken()
        self._set(taken["VmData"] + max(0, self.most - taken["VmRSS"]))

    def lift(self) -> None:
        """Go back to the limit from before."""
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (self.before, self.hard))

    def _set(self, size: int) -> None:
        import resource

        most = min((one for one in (self.before, self.hard) if one != resource.RLIM_INFINITY), default=size)
        resource.setrlimit(resource.RLIMIT_DATA, (min(size, most), self.hard))


class GpuLimit:
    """The share of a GPU that PyTorch's allocator may hold. Not yet run on a GPU."""

    def __init__(self, most: int, device: str) -> None:
        self.most, self.device = most, device

    def renew(self) -> None:
        """Leave to the allocator what the context of the process leaves."""
        import torch

        total = torch.cuda.get_device_properties(self.device).total_memory
        context = int(tables.read("memory")["cuda"]["libraries"])
        self._set(min(1.0, max(0, self.most - context) / total))

    def lift(self) -> None:
        """Let it have the whole GPU."""
        self._set(1.0)

    def _set(self, share: float) -> None:
        import torch

        torch.cuda.set_per_process_memory_fraction(share, self.device)


def _taken() -> dict[str, int]:
    """What Linux says of this process's memory, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.endswith(" kB"))
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in lines}
