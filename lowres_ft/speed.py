"""How fast a device computes, and what a step takes at that rate.

An operation takes as long as its products or as the bytes that it reads and writes, whichever is longer (the roofline
of Williams et al. 2009, doi:10.1145/1498765.1498785), and some time to be started. Of functions such as softmax, a
processor computes fewer numbers in a second than it could read.
"""

import math
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from lowres_ft import allocator, limits, mapped, tables, timings
from lowres_ft.device import Dtype, Machine
from lowres_ft.ledger import Cost
from lowres_ft.recipe import Recipe
from lowres_ft.simulate import Pass
from lowres_ft.spec import Spec

_PRODUCT = {"cpu": 1024, "mps": 2048, "cuda": 4096}
_SUMMED = 2**19  # elements of fp32: three such tensors lie in a processor's caches, as most of a step's do
_COPIED = 2**23  # elements of fp32: more than most caches hold, and little beside a run
_ROUNDS = 4  # turns of what is measured


class Rates(Spec):
    """What a device can do at its best."""

    flops: dict[str, float]
    """FLOPs a second of a large product, by dtype."""
    bandwidth: float
    """Bytes a second that are read or written: by a processor where it adds what its caches hold, elsewhere by copies
    that none holds."""
    link: float
    """Bytes a second by which layers come that pass: from the disk, or over the bus of a GPU."""

    def flops_in(self, dtype: str) -> float:
        """FLOPs a second in a dtype; of one that was not measured, those of the slowest."""
        return self.flops.get(dtype, min(self.flops.values()))


class Share(Spec):
    """How much of its best a device reaches in training: a processor's as measured, a GPU's as is usual."""

    products: float
    """Of the FLOPs of products."""
    bandwidth: float
    """Of the bytes that it can read and write."""
    functions: float
    """The same of operations in which each number takes time (`Cost.function`)."""
    start: float
    """Seconds that it takes to start an operation."""

    @classmethod
    def of(cls, kind: str) -> "Share":
        """That of 'cpu' or 'cuda', or of a device such as 'cuda:0'; others are taken to be like a GPU.

        That of 'bound' is a processor's in a process that maps small tensors too, and gives back before each step; that
        of 'aside' in one whose malloc sets small blocks aside, where large tensors are mapped.
        """
        found = tables.read("speed")
        return cls.model_validate(found.get(kind.partition(":")[0], found["cuda"]))


def share(recipe: Recipe, device: str) -> Share:
    """The one that a run of a recipe reaches on a device."""
    if limits.tightens(recipe, device):
        return Share.of("bound")
    return Share.of("aside" if device == "cpu" and allocator.sets_aside() else device)


def seconds(done: Pass, dtype: Dtype, rates: Rates, share: Share) -> float:
    """How long a micro-batch takes on a device that reaches a share of its rates."""
    flops, rate = rates.flops_in(dtype) * share.products, rates.bandwidth

    def each(cost: Cost) -> float:
        reached = share.functions if cost.function else share.bandwidth
        return max(cost.flops / flops, cost.moved / (rate * reached)) + share.start

    return sum(count * each(cost) for cost, count in done.costs.items())


def starts(done: Pass, share: Share) -> float:
    """How long starting a micro-batch's operations takes, of which `seconds` holds it."""
    return share.start * sum(done.costs.values())


def passing(count: int, rates: Rates) -> float:
    """How long layers of `count` bytes take to come for a micro-batch, forward and backward."""
    return 2 * count / rates.link


@cache
def known(machine: Machine) -> Rates:
    """The rates of this machine: measured once in a process, and kept for others where nothing else computed."""
    found = timings.once(machine, "", kept_as(machine.device), lambda: measured(machine.device), alone=True)
    return Rates.model_validate(found)


def kept_as(device: str) -> str:
    """What the rates of a device are called among what was timed on this machine."""
    return f"rates {device} in turns"


def measured(device: str, each: float = 1.0) -> dict[str, Any]:
    """Measure a device for `each` so many seconds: products in fp32 and bf16, and sums or copies.

    They take turns, as a machine that others share may be slow for a second.
    """
    kind = torch.device(device).type
    size = _PRODUCT[kind]
    calls = {name: _product(size, getattr(torch, name), device) for name in ("float32", "bfloat16")}
    moves, moved = _sum() if kind == "cpu" else _copy(device)
    least: dict[str, float] = {}
    for turn in range(_ROUNDS):
        for name, call in [*calls.items(), ("moves", moves)]:
            taken = _best(call, kind, each / _ROUNDS, times=1 if turn else 3)
            least[name] = min(least.get(name, math.inf), taken)
    bandwidth = moved / least["moves"]
    return {
        "flops": {name: 2.0 * size**3 / least[name] for name in calls},
        "bandwidth": bandwidth,
        "link": bandwidth if kind == "mps" else link(device),
    }


def _product(size: int, dtype: torch.dtype, device: str) -> Callable[[], Any]:
    """A product of square matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: torch.mm(a, b)


def _sum() -> tuple[Callable[[], Any], int]:
    """A sum of a processor, and the bytes that it reads and writes.

    A large copy does not tell: of two processors the one that copied less fast (69 of 102 GB/s) took no longer for what
    else a step does to its tensors, most of which caches hold.
    """
    a, b, c = (torch.zeros(_SUMMED) for _ in range(3))
    return lambda: torch.add(a, b, out=c), 3 * 4 * _SUMMED


def _copy(device: str) -> tuple[Callable[[], Any], int]:
    """A copy of another device, and the bytes that it reads and writes."""
    given, taken = (torch.zeros(_COPIED, device=device) for _ in range(2))
    return lambda: taken.copy_(given), 2 * 4 * _COPIED


def link(device: str) -> float:
    """Bytes a second that come to a device from where layers lie that pass: to a processor from the disk."""
    kind = torch.device(device).type
    if kind == "cpu":
        return mapped.read_rate()
    source = torch.empty(4 * _COPIED, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    return 4 * _COPIED / _best(lambda: target.copy_(source, non_blocking=True), kind, 0.2)


def _best(run: Callable[[], Any], kind: str, most: float, times: int = 3) -> float:
    """Seconds of a call, the least of as many as fit into a time, but for so many: others may use the device too."""
    taken: list[float] = []
    run()
    while len(taken) < times or sum(taken) < most:
        _wait(kind)
        began = time.perf_counter()
        run()
        _wait(kind)
        taken.append(time.perf_counter() - began)
    return min(taken)


def _wait(kind: str) -> None:
    """Let a GPU end what it was asked."""
    if kind != "cpu":
        getattr(torch, kind).synchronize()


def of_table(entry: Mapping[str, Any]) -> Rates:
    """The rates of a device of the table: TFLOPs by dtype and GB a second of its memory as its maker states them.

    Those of the bus are what copies usually reach of PCIe 3 x16 and 4 x8 (12) or 4 x16 (25 in a server or beside a fast
    card, 12 presumed beside others).
    """
    return Rates(
        flops={name: 1e12 * value for name, value in entry["tflops"].items()},
        bandwidth=1e9 * entry["bandwidth"],
        link=1e9 * entry["link"],
    )
