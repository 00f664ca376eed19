"""What this machine is: its device, the dtypes that are fast on it, its processes and its peak memory."""

import hashlib
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from lowres_ft import limits
from lowres_ft.errors import LowresError

Dtype = Literal["float32", "bfloat16", "float16"]
_GROUP = Path("/sys/fs/cgroup")
_CLEAR_REFS = Path("/proc/self/clear_refs")  # where 5 resets VmHWM
_ROUNDS = 8  # of products that are timed


@dataclass(frozen=True)
class Machine:
    """The device that computes, and what is worth knowing of it."""

    device: str
    """'cpu', 'cuda:0' or 'mps'; of other machines, which are told of alone, 'cuda'."""
    name: str
    dtype: Dtype
    """The fastest dtype that trains well here."""
    threads: int
    host: str
    """Hash of the host's name and processor: the place where bits are promised to repeat."""
    processes: int = 1
    rank: int = 0

    @property
    def kind(self) -> str:
        """The device without its number."""
        return self.device.partition(":")[0]


def find(device: str = "auto") -> Machine:
    """Look at the machine. `auto` takes a CUDA device, else MPS, else the processor.

    Raises:
        LowresError: The device that was asked for is not here.
    """
    processes, rank, local = _launched(device)
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = f"cuda:{local}" if torch.cuda.is_available() else "mps" if mps else "cpu"
    elif device == "cuda" and torch.cuda.is_available():
        device = f"cuda:{torch.cuda.current_device()}"  # of a process that was launched, the one that it was given
    shared = (torch.get_num_threads(), _host(), processes, rank)
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise LowresError(f"no device is called '{device}'", hint="Use cpu, cuda, cuda:N or mps.") from error
    if kind == "cpu":
        return _with_fastest(Machine("cpu", _cpu_name(), "float32", *shared))
    if kind == "cuda" and (torch.device(device).index or 0) < torch.cuda.device_count():
        dtype: Dtype = "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
        return Machine(device, torch.cuda.get_device_name(device), dtype, *shared)
    if kind == "mps" and torch.backends.mps.is_available():
        return Machine("mps", "Apple GPU", "float32", *shared)
    raise LowresError(f"the device '{device}' is not here", hint="`--device cpu` works everywhere.")


def _launched(device: str) -> tuple[int, int, int]:
    """Number of processes, rank and local rank, as accelerate's launcher set them up."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 1, 0, 0
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    return state.num_processes, state.process_index, state.local_process_index


def _with_fastest(machine: Machine) -> Machine:
    """The machine with bf16 where its processor multiplies that as fast as fp32, timed once and kept.

    Units for bf16 do not say so: those of AVX-512 take half of fp32's time on one processor and twice on another.
    """
    has = _capabilities()
    if has.get("amx_bf16") or not has.get("avx512_bf16"):
        return replace(machine, dtype="bfloat16" if has.get("amx_bf16") else "float32")
    from lowres_ft import timings  # which knows machines

    taken = timings.once(machine, "", "products in fp32 and bf16", _timed_products)
    faster: Dtype = "bfloat16" if taken["bfloat16"] <= taken["float32"] else "float32"
    return replace(machine, dtype=cast("Dtype", same_for_all(machine, faster)))


def _timed_products() -> dict[str, float]:
    """Seconds of a product as a step has many, by dtype: the least of several, as others may use the processor too."""
    a, b = torch.randn(1024, 768), torch.randn(768, 768)
    given = {str(dtype).removeprefix("torch."): (a.to(dtype), b.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    taken: dict[str, list[float]] = {name: [] for name in given}
    for _ in range(_ROUNDS):
        for name, (x, weight) in given.items():
            began = time.perf_counter()
            torch.mm(x, weight)
            taken[name].append(time.perf_counter() - began)
    return {name: min(seconds) for name, seconds in taken.items()}


def _capabilities() -> Mapping[str, Any]:
    """What the processor can do; PyTorch before 2.11 tells it by functions of its own."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    amx, avx512 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001
    return {"amx_bf16": amx, "avx512_bf16": avx512}


def _cpu_name() -> str:
    return str(_capabilities().get("cpu_name") or platform.processor() or platform.machine())


def _host() -> str:
    told = f"{platform.node()}|{platform.machine()}|{sorted(_capabilities().items())}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of what computes."""
    found = {"python": platform.python_version()}
    for package in ("lowres-ft", "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in one exchange."""
    from accelerate.utils import reduce

    device = tensors[0].device
    flat: Tensor = torch.cat([tensor.reshape(-1).to(device, torch.float32) for tensor in tensors])
    total = reduce(flat, reduction="sum")
    for tensor, part in zip(tensors, total.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def is_first() -> bool:
    """True in the process that writes and prints; asked without a look at the machine."""
    return os.environ.get("RANK", "0") == "0"


def wait_for_all(machine: Machine) -> None:
    """Return when every process has come here."""
    if machine.processes > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def same_for_all(machine: Machine, text: str) -> str:
    """The first process's text, in every process."""
    if machine.processes == 1:
        return text
    from accelerate.utils import broadcast_object_list

    return str(broadcast_object_list([text])[0])


def forget_peak(device: str) -> None:
    """Let the peak begin anew, where the system can; elsewhere it stays that of the whole process."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        _CLEAR_REFS.write_bytes(b"5")


def peak_bytes(device: str) -> int:
    """Most memory that this process held so far: resident on a processor; on a GPU what its allocator reserved.

    With that counts what the table says of a GPU's context, which no allocator knows, so that it is what a plan tells.
    """
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_reserved(device)) + limits.context()
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    if (status := Path("/proc/self/status")).is_file():  # getrusage's figure begins with that of the parent process
        found = (line.split() for line in status.read_text().splitlines())
        return next(int(fields[1]) * 1024 for fields in found if fields and fields[0] == "VmHWM:")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def total_bytes(device: str) -> int:
    """Memory of a device: of a GPU its own, of a processor what this process may have of the machine's."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    return min(int(psutil.virtual_memory().total), _group("memory.max"))


def free_bytes(device: str) -> int:
    """Memory of a device that this process has or could have now; what others left is shared with those of its run."""
    if device.startswith("cuda"):
        own = int(torch.cuda.memory_reserved(device)) + limits.context()  # whose context stands as this is asked
        return own + int(torch.cuda.mem_get_info(device)[0])
    import psutil

    taken = _group("memory.current", 0) - _reclaimable()
    left = min(int(psutil.virtual_memory().available), max(0, _group("memory.max") - taken))
    return int(psutil.Process().memory_info().rss) + left // local_processes()


def local_processes() -> int:
    """Processes of this run on this host, as their launcher says."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _group(name: str, unlimited: int = sys.maxsize) -> int:
    """A figure of the control group that a container or a scheduler put this process in (Linux, version 2)."""
    try:
        return int((_GROUP / name).read_text())
    except (OSError, ValueError):  # no groups, or "max"
        return unlimited


def _reclaimable() -> int:
    """Bytes of files that the control group counts as its memory, and that the system gives away when it is asked."""
    try:
        counted = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        return int(counted["inactive_file"])
    except (OSError, ValueError, KeyError):
        return 0
