"""What this machine is, whether its libraries work together, and what will run on it. No network is asked.

It works where PyTorch or bitsandbytes cannot be imported: that is then what it tells.
"""

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lowres_ft import files, libraries
from lowres_ft.errors import first_line
from lowres_ft.sizes import show_bytes

State = Literal["good", "slow", "missing", "broken"]
"""As wished; working, but not at its best; not there and not needed; needed and not working."""
_NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "peft", "accelerate", "numpy")
_WISHED = ("bitsandbytes",)
_FEATURES = {
    "amx_bf16": "bf16 products by AMX",
    "amx_int8": "int8 products by AMX",
    "avx512_bf16": "bf16 products by AVX-512",
    "avx512_vnni": "int8 products by AVX-512",
    "avx2": "fp32 products of 8 numbers at once",
}
_ROOM = 2 * 1024**3  # bytes of disk that a starter and a bundle want


@dataclass(frozen=True)
class Finding:
    """Something that was looked at."""

    what: str
    found: str
    state: State
    advice: str = ""


@dataclass(frozen=True)
class Examination:
    """All that was found, in the order in which it is shown."""

    findings: tuple[Finding, ...]

    @property
    def usable(self) -> bool:
        """Whether nothing that is needed is broken."""
        return all(finding.state != "broken" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """For a report of a bug."""
        return {"usable": self.usable, "findings": [asdict(finding) for finding in self.findings]}


def examine(*, probe: bool = True, place: Path | None = None) -> Examination:
    """Look at processor, memory, disk, libraries, devices and kernels; measure speed where a `probe` is wanted."""
    place = place or Path.cwd()
    found = [_python(), _processor(), *_memory(), _disk("disk, here", place), _disk("disk, cache", files.cache_dir())]
    found += [_library(name, needed=True) for name in _NEEDED] + [_library(name, needed=False) for name in _WISHED]
    if _imported("torch") is None:
        found += [*_devices(), *_kernels(), *(_speed() if probe else ())]
    return Examination(tuple(found))


def _python() -> Finding:
    system = f"{platform.python_version()} on {platform.system()} {platform.release()} ({platform.machine()})"
    good = sys.version_info >= (3, 11)
    return Finding("Python", system, "good" if good else "broken", "" if good else "Use Python 3.11 or newer.")


def _processor() -> Finding:
    """Its name, and what decides how fast it multiplies."""
    name, flags = _processor_flags()
    known = [flag for flag in _FEATURES if flag in flags]
    told = f"{name}, {os.cpu_count()} threads; {', '.join(known) or 'no units for matrices'}"
    if not {"amx_bf16", "avx512_bf16"} & flags:
        return Finding("processor", told, "slow", "It has no units for bf16, so fp32 computes.")
    return Finding("processor", told, "good")


def _processor_flags() -> tuple[str, set[str]]:
    """Name and features of the processor, by Linux's names."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return _sysctl()
    fields = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return fields.get("model name", platform.processor() or platform.machine()), flags


def _sysctl() -> tuple[str, set[str]]:
    """The same on macOS, whose features have the form FEAT_BF16: 1."""
    if sys.platform != "darwin":
        return platform.processor() or platform.machine(), set()
    asked = ["/usr/sbin/sysctl", "machdep.cpu.brand_string", "hw.optional"]
    text = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    fields = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    on = {name.rpartition(".")[2].lower() for name, value in fields.items() if value == "1"}
    return fields.get("machdep.cpu.brand_string", platform.machine()), on


def _memory() -> Iterator[Finding]:
    """Of the machine, and how much of it is free."""
    try:
        import psutil
    except ImportError as error:
        yield Finding("memory", first_line(error), "broken", "pip install psutil")
        return
    held = psutil.virtual_memory()
    enough = held.available >= _ROOM
    told = f"{show_bytes(held.available)} free of {show_bytes(held.total)}"
    yield Finding("memory", told, "good" if enough else "slow", "" if enough else "Close other programs.")


def _disk(what: str, place: Path) -> Finding:
    """Room where a folder is, or will be."""
    nearest = next(parent for parent in (place, *place.absolute().parents) if parent.exists())
    free = shutil.disk_usage(nearest).free
    told = f"{show_bytes(free)} free at {place}"
    if not os.access(nearest, os.W_OK):
        return Finding(
            what, f"{place} cannot be written", "broken", "Choose another place with --out, or LOWRES_FT_CACHE."
        )
    return Finding(what, told, *(("good", "") if free >= _ROOM else ("slow", "Make room: 2 GiB are soon used.")))


def _library(name: str, *, needed: bool) -> Finding:
    """Its version, whether that is one that we take, and whether it can be imported."""
    absent: State = "broken" if needed else "missing"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", absent, f"pip install '{_wanted(name) or name}'")
    wanted = _wanted(name)
    if wanted and not _takes(wanted, version):
        return Finding(name, f"{version}, which is not {wanted}", "broken", f"pip install '{wanted}'")
    if (error := _imported(name)) is not None:
        return Finding(
            name, f"{version} cannot be imported: {error}", "broken", f"pip install --force-reinstall {name}"
        )
    return Finding(name, version, "good")


def _wanted(name: str) -> str | None:
    """What our own package says that it takes, such as torch>=2.9; None of what it does not ask for."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("lowres-ft") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder that was never installed
        return None
    found = [Requirement(line) for line in lines]
    return next((str(one).partition(";")[0].strip() for one in found if one.name == name and one.marker is None), None)


def _takes(wanted: str, version: str) -> bool:
    from packaging.requirements import Requirement

    return Requirement(wanted).specifier.contains(version, prereleases=True)


def _imported(name: str) -> str | None:
    """Why a library cannot be imported; None where it can."""
    load: Callable[[], object] = {"bitsandbytes": libraries.bitsandbytes, "peft": libraries.peft}.get(
        name, lambda: importlib.import_module(name)
    )
    try:
        load()
    except Exception as error:  # noqa: BLE001 (of a broken library anything may come, and it is what is told)
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def _devices() -> Iterator[Finding]:
    """GPUs, with their driver's and PyTorch's versions of CUDA."""
    import torch

    if not torch.cuda.is_available():
        built = (
            f"PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "PyTorch is built without CUDA"
        )
        apple = torch.backends.mps.is_available()
        yield Finding("GPU", "Apple's (MPS)" if apple else f"none; {built}", "good" if apple else "missing")
        return
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        size = show_bytes(torch.cuda.get_device_properties(index).total_memory)
        told = f"{torch.cuda.get_device_name(index)}, {size}, capability {major}.{minor}, CUDA {torch.version.cuda}"
        if f"sm_{major}{minor}" in torch.cuda.get_arch_list() or major >= 8:
            yield Finding(
                f"cuda:{index}", told, "good" if major >= 8 else "slow", "" if major >= 8 else "fp16 computes."
            )
        else:
            yield Finding(f"cuda:{index}", told, "broken", "This PyTorch was built without this GPU: install another.")


def _kernels() -> Iterator[Finding]:
    """What will compute here."""
    from lowres_ft import device

    machine = device.find()
    yield Finding("computes in", f"{machine.dtype} on {machine.name}, {machine.threads} threads", "good")
    attention = (
        "products of matrices, timed for each length, or PyTorch's" if machine.kind == "cpu" else "PyTorch's fused"
    )
    yield Finding("attention", attention, "good")
    quantized = _imported("bitsandbytes") is None
    told = "bitsandbytes' formats, products by PyTorch" if quantized else "not without bitsandbytes"
    yield Finding(
        "int8 and nf4", told, "good" if quantized else "missing", "" if quantized else "pip install bitsandbytes"
    )


def _speed() -> Iterator[Finding]:
    """A few seconds of products, sums and copies."""
    from lowres_ft import device, speed

    machine = device.find()
    rates = speed.Rates.model_validate(speed.measured(machine.device))
    for dtype, flops in rates.flops.items():
        yield Finding(f"products in {dtype}", f"{flops / 1e12:.2f} TFLOP/s", "good")
    on_cpu = ("sums in caches", "disk, read in order")
    moved, link = on_cpu if machine.kind == "cpu" else ("memory bandwidth", "copies to the device")
    yield Finding(moved, f"{rates.bandwidth / 1e9:.1f} GB/s", "good")
    yield Finding(link, f"{rates.link / 1e9:.1f} GB/s", "good")
