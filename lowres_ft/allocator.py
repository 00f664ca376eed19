"""How memory of tensors is had and given back: where malloc leaves holes between them, and what is done about it.

glibc's malloc keeps what is freed for later. But an aligned block, as PyTorch asks for, is cut from one that is up to
96 bytes larger, whose rest malloc sets aside for the next small thing, which may stay: then what the block leaves is
too short for its like, and heaps grow with holes, 0.9 GB of them beside 0.3 GB in use (RoBERTa-base in fp32,
activations computed again). Two ways out:

- The command line begins itself again with a malloc that sets nothing aside, so that the rest goes back to its block
  (`restart`). All tensors lie in the heap then.
- In a program that imports lowres_ft, tensors of wide models are mapped by themselves and go back to the system when
  they are freed (`settle`). Mapping costs a fault for each page that is touched, so PyTorch asks for huge ones; a step
  still takes up to half as long again (benchmarks/NOTES.md).

Holes grow with time, as each step leaves others. So what lies free in the heap goes back to the system between
micro-batches (`tidy`), as often as that costs a hundredth of the time.
"""

import ctypes
import mmap
import os
import re
import sys
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

HUGE = 2**21  # bytes from which PyTorch asks for huge pages
_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1  # of mallopt, in glibc
MAPPED = 2**18  # bytes from which memory is mapped by itself where every page counts
_TOP, _LITTLE = 2**25, 2**17  # bytes at the end of the heap that are kept for what is asked next; those of glibc
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")  # how smaps begins to tell of one
_STACK = 2**21  # bytes of a thread's; macOS gives it a quarter of that
_WIDE = 512  # numbers that stand for a token in a layer
_SHARE = 0.01  # of the time, that it may cost to give memory back and to have it again
_AGAIN = 3.6e-10  # seconds to have a byte again: 1.5 us for a page of 4 KiB
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_BEGAN = Path("/proc/self/environ")  # as this process began; what it says to itself later is not here
_TUNABLES, _PAGES = "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE"
_ASIDE = ("glibc.malloc.tcache_count=0", "glibc.malloc.mxfast=0")  # of blocks that are set aside: how many, how large
_HEAP = f"glibc.malloc.mmap_threshold={2**30}"  # all tensors lie in the heap, and its end is given back when it is free
_MAPS = "MALLOC_MMAP_THRESHOLD_"  # by which a user too may say what is mapped
_asks = False  # whether it was said here that PyTorch is to ask for huge pages


def ask_for_huge_pages() -> None:
    """Let PyTorch ask for huge pages, in which mapped tensors cost less; nothing where the user said so or not.

    It aligns large tensors to pages then, which leaves more holes in a heap: so not where all of them lie there.
    """
    global _asks
    if _PAGES not in os.environ and sets_aside():
        os.environ[_PAGES], _asks = "1", True


def restart() -> None:
    """Begin this process again with a malloc that sets no small blocks aside.

    Nothing happens if it began so, if the user told malloc something else of it, or if malloc is not glibc's. It costs
    20 ms before anything is imported. Other threads end, and files that are not standard streams are closed.
    """
    told, ours = os.environ.get(_TUNABLES, ""), (*_ASIDE, _HEAP)
    said = _MAPS in os.environ or any(setting.partition("=")[0] in told for setting in ours)
    if said or not sys.executable or not tightens():
        return
    os.environ[_TUNABLES] = ":".join([*filter(None, [told]), *ours])
    if _asks:
        del os.environ[_PAGES]
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606  (no shell is the point)


def sets_aside() -> bool:
    """Whether malloc of this process sets small blocks aside."""
    try:
        began = _BEGAN.read_bytes().decode(errors="replace")
    except OSError:
        return True
    words = re.split(f"{_TUNABLES}=|[:\0]", began)  # glibc ends each setting by a zero as it reads it
    return not all(setting in words for setting in _ASIDE)


@cache
def has_huge_pages() -> bool:
    """Whether large tensors lie in huge pages: the system gives them to all, or to PyTorch, which asks."""
    try:
        told = _SETTING.read_text()
    except OSError:
        return False
    return "[always]" in told or ("[madvise]" in told and _pytorch_asks())


def _pytorch_asks() -> bool:
    """Whether PyTorch asks for them, which it reads from the environment before its first tensor."""
    import torch

    tensor = torch.empty(2 * HUGE, dtype=torch.uint8)
    flags = ""
    with open("/proc/self/smaps", encoding="ascii", errors="replace") as lines:
        for line in lines:
            if (place := _MAPPING.match(line)) and int(place[1], 16) <= tensor.data_ptr() < int(place[2], 16):
                flags = next((line for line in lines if line.startswith("VmFlags:")), "")
    return "hg" in flags.split()


def maps(hidden: int) -> bool:
    """Whether tensors of a model `hidden` numbers wide are to be mapped.

    Not where the user told malloc something else, nor where the system has no huge pages, nor where malloc sets nothing
    aside, nor those of narrow models: MiniLM's products on short texts are so small that what is left of a tensor
    beside its huge pages costs a tenth of a step.
    """
    wanted = hidden >= _WIDE and sets_aside() and _MAPS not in os.environ
    return wanted and tightens() and has_huge_pages()


def settle(hidden: int) -> None:
    """Let large tensors be mapped by themselves from here on, where those of such a model are to be.

    In a process that was tightened they are already.
    """
    if maps(hidden) and not _tightened:
        _tell(_MMAP_THRESHOLD, HUGE)
        _tell(_TRIM_THRESHOLD, _TOP)


def share() -> None:
    """Let threads take little of what is mapped: they share one heap, and have small stacks; for bounded processes.

    Each would have up to 64 MiB of a heap of its own else, mapped until the process ends once it was used, and 8 MiB of
    a stack. Both count against a limit of what is mapped (RLIMIT_DATA), touched or not. What began before stays.
    """
    if not tightens():
        return
    _tell(_ARENA_MAX, 1)
    library, settings = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    if hasattr(library, "pthread_setattr_default_np") and not library.pthread_getattr_default_np(settings):
        library.pthread_attr_setstacksize(settings, ctypes.c_size_t(_STACK))
        library.pthread_setattr_default_np(settings)


_tightened = False  # malloc's settings are of the process, and nobody can ask it for them


def tighten() -> None:
    """Let no room lie in the midst of a heap: smaller blocks are mapped too, and threads share one heap.

    It stays so until the process ends, and costs time: for processes whose memory is bounded.
    """
    global _tightened
    if tightens():
        _tightened = True
        share()
        _tell(_MMAP_THRESHOLD, MAPPED)
        _tell(_TRIM_THRESHOLD, _LITTLE)


def tightens() -> bool:
    """Whether `tighten` does anything: malloc is glibc's."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")


def _tell(parameter: int, value: int) -> None:
    ctypes.CDLL(None).mallopt(parameter, value)


_due = 0.0  # when the heap is tidied again; it is of the process


def tidy() -> None:
    """Give back what lies free in the heap, unless it was so lately that it would cost more than it may."""
    global _due
    if (began := time.perf_counter()) < _due or not tightens():
        return
    before = resident()
    give_back()
    ended = time.perf_counter()
    _due = ended + (ended - began + _AGAIN * max(0, before - resident())) / _SHARE


def give_back() -> None:
    """Give freed memory back to the system, as far as the C library (glibc) can."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


class Taken(NamedTuple):
    """Bytes of this process."""

    mapped: int
    """All of them, touched or not (VmSize, which RLIMIT_AS limits)."""
    resident: int
    """In memory (VmRSS)."""
    data: int
    """Mapped privately, to be written to (VmData, which RLIMIT_DATA limits)."""


def taken() -> Taken:
    """What this process takes now, on Linux."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.endswith(" kB"))
    told = {name: int(value) * 1024 for name, value, _ in lines}
    return Taken(told["VmSize:"], told["VmRSS:"], told["VmData:"])


def resident() -> int:
    """Bytes of this process that are resident, on Linux; told sooner than by `taken`."""
    return _pages()[1] * mmap.PAGESIZE


def written() -> int:
    """Those of them that lie in no file, on Linux."""
    _, all_of_it, in_files, *_ = _pages()
    return (all_of_it - in_files) * mmap.PAGESIZE


def _pages() -> list[int]:
    """Pages that are mapped, that are resident, that are resident of files, and others."""
    return list(map(int, Path("/proc/self/statm").read_text().split()))
