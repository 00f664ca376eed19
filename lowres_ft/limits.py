"""What `budget.memory` bounds: refused early where libraries alone take more, and held to while a run computes.

Linux has no limit of resident memory that a process may set itself; RLIMIT_DATA bounds what is mapped privately and may
be written (VmData), touched or not, and no mapped file. So a bound of `most` resident bytes becomes a soft limit of

    VmData + most - VmRSS

as both stand when a step or a batch of an evaluation begins: what is mapped from then on may take what is left. A
tensor that would go beyond fails in PyTorch, which a run answers with a finer cut (`shortage`). Room in the midst of
malloc's heap, whose pages were given back, would fill without being seen: where a bound is held, tensors of 1 MiB and
more are mapped by themselves, and threads share one heap.

The limit stands only while tensors are computed, in a thread of its own. Elsewhere tokenizers, OpenMP and Python's own
threads would end the process, or wait for ever, where memory fails them; what they take, and the weights, count when
the next step begins. And oneDNN's generator of code (Xbyak) keeps an error of memory for the thread in which it came
up, where it makes nothing new any more.
"""

import ctypes
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lowres_ft import tables
from lowres_ft.errors import ModelError, OutOfMemoryError
from lowres_ft.events import Listener, Note
from lowres_ft.recipe import Recipe
from lowres_ft.sizes import parse_bytes, show_bytes

T = TypeVar("T")
_SHARE, _LEAST = 0.05, 512 * 2**20
_ARENA_MAX, _MMAP_THRESHOLD = -8, -3  # of mallopt, in glibc
_MAPPED = 2**20  # bytes from which memory is mapped by itself
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


@contextmanager
def held(most: int | None, device: str, listen: Listener) -> Iterator[None]:
    """Hold what is computed `apart` in this process, or its share of a GPU, to so many bytes.

    Raises:
        OutOfMemoryError: The process takes more already.
    """
    global _limit
    if most is None:
        yield
    elif device.startswith("cuda"):
        with _share_of_gpu(most, device):
            yield
    elif device == "cpu" and sys.platform == "linux":
        limit = Limit.now(most)
        try:
            _limit = limit
            yield
        finally:
            _limit = None
    else:
        listen(Note("budget.memory bounds the plan alone: this system cannot hold a process to it"))
        yield


@dataclass(frozen=True)
class Limit:
    """A bound of this process's resident memory."""

    most: int

    @classmethod
    def now(cls, most: int) -> "Limit":
        """A bound from here on. How malloc maps memory stays so until the process ends.

        Raises:
            OutOfMemoryError: The process takes more already.
        """
        _start_threads()
        if hasattr(library := ctypes.CDLL(None), "mallopt"):
            library.mallopt(_ARENA_MAX, 1)
            library.mallopt(_MMAP_THRESHOLD, _MAPPED)
        trim()
        if (taken := _taken()["VmRSS"]) >= most:
            raise OutOfMemoryError(
                f"this process takes {show_bytes(taken)} before the base is loaded, and may take {show_bytes(most)}",
                hint="Give budget.memory more.",
            )
        return cls(most)

    @property
    def data(self) -> int:
        """The soft limit, RLIMIT_DATA, that keeps the process within."""
        taken = _taken()
        return taken["VmData"] + max(0, self.most - taken["VmRSS"])


_limit: Limit | None = None  # it is of the process, so there is one


def apart(call: Callable[[], T]) -> T:
    """What a call gives; where this process is held to a bound, computed under it."""
    if _limit is None:
        return call()
    import resource

    found: list[T] = []
    failed: list[BaseException] = []
    limit, before = _limit, resource.getrlimit(resource.RLIMIT_DATA)
    outer = [one for one in before if one != resource.RLIM_INFINITY]

    def held_to() -> None:
        try:
            _start_threads()
            resource.setrlimit(resource.RLIMIT_DATA, (min([limit.data, *outer]), before[1]))
            try:
                found.append(call())
            finally:
                resource.setrlimit(resource.RLIMIT_DATA, before)
        except BaseException as error:  # noqa: BLE001 (raised in the thread that waits)
            failed.append(error)

    thread = threading.Thread(target=held_to)
    thread.start()
    thread.join()
    if failed:
        raise failed.pop()
    return found.pop()


@contextmanager
def _share_of_gpu(most: int, device: str) -> Iterator[None]:
    """Let PyTorch's allocator hold what the context of the process leaves of `most` bytes. Not yet run on a GPU."""
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    context = int(tables.read("memory")["cuda"]["libraries"])
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, most - context) / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def trim() -> None:
    """Give freed memory back to the system, as far as the C library (glibc) can."""
    gc.collect()
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def _start_threads() -> None:
    """Let this thread have its helpers of OpenMP."""
    import torch

    torch.ones(_WARM).sum()


def _taken() -> dict[str, int]:
    """What Linux says of this process's memory, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.endswith(" kB"))
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in lines}
