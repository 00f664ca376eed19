"""What `budget.memory` bounds, held to while a run computes.

Linux has no limit of resident memory that a process may set itself. So resident memory is looked at before each module
computes, and before each adapted layer does in the backward pass: 32 MiB below the bound a MemoryError says that it is
reached, which a run answers with a finer cut of the same step (`shortage`). Behind that stands a limit of the system,
for what takes more at once. RLIMIT_DATA bounds what is mapped privately and may be written (VmData), touched or not,
and no mapped file; a bound of `most` resident bytes becomes

    VmData + most - VmRSS

as both stand when a step or a batch of an evaluation begins. Room in the midst of malloc's heap, whose pages were given
back, would fill without being seen: where a bound is held, tensors of 256 KiB and more are mapped by themselves,
threads share one heap, and what was freed in it is given back before each step.

The limit alone would not do. oneDNN's generated code may crash where it gets no memory, and its generator (Xbyak) keeps
an error for the thread in which it came up, where it makes nothing new any more; tokenizers and OpenMP end the process,
and Python's own threads wait for ever, as OpenBLAS does. So it stands only while tensors are computed, in a thread of
its own. What others take, and the weights, count when the next step begins.
"""

import _thread
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lowres_ft import allocator, outside, tables
from lowres_ft.errors import OutOfMemoryError
from lowres_ft.events import Listener, Note
from lowres_ft.outside import Outside
from lowres_ft.recipe import Recipe
from lowres_ft.sizes import show_bytes

T = TypeVar("T")
_SHARE, _LEAST = 0.05, 512 * 2**20
_DOUBT = 0.05  # of what is told, by which the truth may lie above
SPARE = 32 * 2**20
"""Bytes below a bound, in which libraries still find what little they need."""
_PRODUCTS = "OPENBLAS_NUM_THREADS"  # each of which has 32 MiB; NumPy's own products are few
_WARM = 2**20  # elements: enough for all threads of PyTorch to begin


def reserve(total: int) -> int:
    """Bytes of a memory of `total` that `budget.memory: auto` leaves to others."""
    return max(round(_SHARE * total), _LEAST)


def given(total: int, device: str) -> int:
    """Bytes that a run has to be given which is told to take `total`: it may err, and on a processor a bound spares."""
    spare = SPARE if device == "cpu" else 0
    return round((1 + _DOUBT) * total) + spare


def context() -> int:
    """Bytes of a GPU that a process takes beside its tensors, which no allocator counts."""
    return int(tables.read("memory")["cuda"]["libraries"])


def tightens(recipe: Recipe, device: str) -> bool:
    """Whether a recipe's bound changes how malloc maps memory in its process (`allocator.tighten`)."""
    return device == "cpu" and recipe.budget.memory is not None and allocator.tightens()


def expect(memory: str | None) -> None:
    """Where a budget or the system sets a bound, let libraries that come now map little that they never touch."""
    if not allocator.tightens() or not (memory is not None or outside.found()):
        return
    if memory is None:
        allocator.share()
    else:
        allocator.tighten()
    if "numpy" not in sys.modules and _PRODUCTS not in os.environ:
        os.environ[_PRODUCTS] = "1"
        start_products()
        del os.environ[_PRODUCTS]  # which other libraries, and other processes, read too


@contextmanager
def held(most: int | None, device: str, listen: Listener) -> Iterator[None]:
    """Hold what is computed `apart` in this process, or its share of a GPU, to so many bytes.

    Raises:
        OutOfMemoryError: The process takes more already.
    """
    global _limit
    outer = _limit
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
            _limit = outer
    else:
        listen(Note("budget.memory bounds the plan alone: this system cannot hold a process to it"))
        yield


@dataclass(frozen=True)
class Limit:
    """A bound of this process's resident memory, beside limits of what it maps."""

    most: int
    outside: tuple[Outside, ...] = ()
    """Those of the system, which stand beside it."""

    def look(self) -> None:
        """See that there is room for what comes next.

        Raises:
            MemoryError: The bound is reached.
        """
        if (taken := allocator.resident()) > self.most - SPARE:
            raise MemoryError(f"{show_bytes(taken)} are resident, and {show_bytes(self.most)} may be")
        for limit in self.outside:
            if limit.left(now := allocator.taken()) < SPARE:
                counted, most = show_bytes(limit.counted(now)), show_bytes(limit.most)
                raise MemoryError(f"{counted} are mapped, and {most} may be, as {limit.name} says")

    @classmethod
    def now(cls, most: int) -> "Limit":
        """A bound from here on. How malloc maps memory stays so until the process ends.

        Raises:
            OutOfMemoryError: The process takes more already.
        """
        allocator.tighten()
        _start_threads()
        start_products()
        trim()
        if (taken := allocator.resident()) >= most:
            raise OutOfMemoryError(
                f"this process takes {show_bytes(taken)} before the base is loaded, and may take {show_bytes(most)}"
                + outside.named(most)
            )
        return cls(most, outside.found())

    @property
    def data(self) -> int:
        """The soft limit, RLIMIT_DATA, that keeps the process within."""
        allocator.give_back()
        now = allocator.taken()
        return now.data + max(0, self.most - now.resident)


_limit: Limit | None = None  # it is of the process, so there is one


def held_now() -> bool:
    """Whether this process is held to a bound of its resident memory."""
    return _limit is not None


def left() -> int | None:
    """Bytes that this process may still have within its bound; None where it has none."""
    if _limit is None:
        return None
    now = allocator.taken()
    return min([_limit.most - SPARE - now.resident, *(limit.left(now) - SPARE for limit in _limit.outside)])


def room_beside() -> int | None:
    """Bytes that a child may take beside what it shares with this process; None where nothing bounds them.

    They are bounded by what this process is held to, and by limits of the system that it was begun with. Nothing counts
    the code that the child brings, nor its copies of shared pages that it writes to: twice what is spared is left for
    both.
    """
    if sys.platform != "linux":
        return None
    if _limit is not None:
        trim()
    now = allocator.taken()
    own = [] if _limit is None else [_limit.most - 2 * SPARE - now.resident]
    return min([*own, *(limit.left(now) for limit in outside.found())], default=None)


def apart(call: Callable[[], T]) -> T:
    """What a call gives; where this process is held to a bound, computed under it.

    What interrupts the wait, such as a signal, is raised once the call has ended, which it does where it next looks.
    """
    return call() if _limit is None else _Work(call, _limit).result()


class _Left(BaseException):
    """What a call would give is not wanted any more."""


class _Work(Generic[T]):
    """A call that computes under a limit, in a thread of its own."""

    def __init__(self, call: Callable[[], T], limit: Limit) -> None:
        self.call = call
        self.limit = limit
        self.found: list[T] = []
        self.failed: list[BaseException] = []
        self.left = self.done = False
        self.running = _thread.allocate_lock()

    def look(self) -> None:
        """See that what is computed is wanted, and that there is room for what comes next."""
        if self.left:
            raise _Left
        self.limit.look()

    def result(self) -> T:
        """Start the thread and wait for its end, whatever interrupts: no limit outlives its call.

        `threading.Thread` would not do. Its `start` waits, too, so that an interrupt leaves open whether it started;
        and an interrupted `join` may take a thread that runs for one that has ended, which aborts the process at exit.
        """
        interrupted: list[BaseException] = []
        self.running.acquire()
        try:
            _thread.start_new_thread(self._run, ())
        except (RuntimeError, MemoryError):  # there is none
            raise
        except BaseException as error:  # noqa: BLE001 (raised below)
            interrupted.append(error)
            self.left = True
        while not self.done:
            try:
                self.running.acquire()
            except BaseException as error:  # noqa: BLE001 (raised below)
                interrupted.append(error)
                self.left = True
        raised, self.failed = interrupted or self.failed, []
        if raised:
            raise raised.pop()  # from here on nothing but its handler holds it, and what its frames hold
        return self.found.pop()

    def _run(self) -> None:
        try:
            self._limited()
        except BaseException as error:  # noqa: BLE001 (raised in the thread that waits)
            self.failed.append(error)
        finally:
            self.done = True
            self.running.release()

    def _limited(self) -> None:
        import resource

        before = resource.getrlimit(resource.RLIMIT_DATA)
        outer = [one for one in before if one != resource.RLIM_INFINITY]
        _start_threads()
        resource.setrlimit(resource.RLIMIT_DATA, (min([self.limit.data, *outer]), before[1]))
        try:
            with _looking(self):
                self.found.append(self.call())
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, before)


_looked: _Work[Any] | None = None  # what is computed now


@contextmanager
def _looking(work: _Work[Any]) -> Iterator[None]:
    """Look before each module computes."""
    global _looked
    from torch.nn.modules.module import register_module_forward_pre_hook

    def before(*_: Any) -> None:
        work.look()

    _looked, hook = work, register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()
        _looked = None


def look() -> None:
    """See that there is room for what comes next, where a bound is held, and that it is still waited for.

    Raises:
        MemoryError: The bound is reached.
    """
    if _looked is not None:
        _looked.look()


@contextmanager
def _share_of_gpu(most: int, device: str) -> Iterator[None]:
    """Let PyTorch's allocator hold what the context of the process leaves of `most` bytes. Not yet run on a GPU."""
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    before = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
    torch.cuda.empty_cache()  # what the allocator keeps for later counts
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, most - context()) / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def trim() -> None:
    """Drop what nothing holds any more, and give its memory back to the system."""
    gc.collect()
    if (arrow := sys.modules.get("pyarrow")) is not None:
        arrow.default_memory_pool().release_unused()
    allocator.give_back()


def _start_threads() -> None:
    """Let this thread have its helpers of OpenMP."""
    import torch

    torch.ones(_WARM).sum()


def start_products() -> None:
    """Let NumPy's OpenBLAS have its work space, for which it asks for ever where it gets none."""
    import numpy as np

    square = np.ones((256, 256))
    np.dot(square, square)
