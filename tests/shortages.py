"""Whole runs in which memory runs out at random places: `python -m tests.shortages [--runs 50] [--seed 7]`.

Each run fails once or three times, at operations that are drawn from its parts in turn: loading, what is tried and
trained, scoring, and the look at what was written. It has to end with the losses and the adapter of the undisturbed run
to rounding, or with one error that names a remedy, and no bundle.
"""

import argparse
import collections
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from lowres_ft.errors import OutOfMemoryError
from lowres_ft.events import Event, Stage
from lowres_ft.pipeline import run
from lowres_ft.recipe import Recipe
from tests import conftest, tiny

SAID = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
KINDS: tuple[Callable[[], Exception], ...] = (
    lambda: RuntimeError(f"{SAID} 4096 bytes. Error code 12 (Cannot allocate memory)"),
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
    MemoryError,
)
CHANGES = ("train.steps=4", "train.evaluate_every=2", "method.dropout=0.2", "data.probe_rows=2")
"""Four steps with dropout in the adapter, evaluated twice."""


class Failing(TorchDispatchMode):
    """Raises an error of memory at given operations, counted from where it begins."""

    def __init__(self, at: set[int], error: Callable[[], Exception]) -> None:
        super().__init__()
        self.at, self.error, self.done, self.raised = at, error, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.done += 1
        if self.done in self.at:
            self.raised += 1
            raise self.error()
        return func(*args, **(kwargs or {}))


class Disturbed:
    """A recipe, what it gives undisturbed, and what comes of it where memory runs out."""

    def __init__(self, recipe: Recipe, room: Path) -> None:
        self.recipe, self.room = recipe, room
        run(recipe, room / "first", device_name="cpu")  # accounts and timings are kept from now on
        begins: list[tuple[str, int]] = []

        def listen(event: Event) -> None:
            if isinstance(event, Stage):
                words = event.text.split()  # two stages begin with "loading": what was written is loaded, too
                begins.append((words[-1] if words[-1] == "comparing" else words[0], counting.done + 1))

        with Failing(set(), MemoryError) as counting:
            bundle = run(recipe, room / "straight", device_name="cpu", listen=listen).folder
        self.expected = losses(bundle), adapter(bundle)
        ends = [first for _, first in begins[1:]] + [counting.done + 1]
        self.parts = {
            part: range(first, end) for (part, first), end in zip(begins, ends, strict=True) if end - first > 2
        }

    def outcome(self, name: str, at: set[int], error: Callable[[], Exception]) -> str:
        """What a run came to that fails at some operations; it begins with "wrong" where it may not be."""
        place = self.room / name
        with Failing(at, error) as failing:
            try:
                bundle = run(self.recipe, place, device_name="cpu").folder
            except OutOfMemoryError as ended:
                whole = bool(ended.hint) and not place.exists()
                return f"error ({ended})" if whole else f"wrong: left a bundle, or no hint ({ended})"
        if not failing.raised:
            return "wrong: nothing failed"
        found = losses(bundle), adapter(bundle)
        try:
            torch.testing.assert_close(found, self.expected, rtol=1e-3, atol=1e-5)
        except AssertionError as differs:
            return f"wrong: {str(differs).splitlines()[0]}"
        return "the same"


def losses(bundle: Path) -> list[float]:
    """Of each step of a run."""
    return [loss for _, loss in json.loads((bundle / "report.json").read_bytes())["curves"]["loss"]]


def adapter(bundle: Path) -> dict[str, torch.Tensor]:
    """What a run trained."""
    return load_file(bundle / "adapter_model.safetensors")


def main() -> int:
    parser = argparse.ArgumentParser(description="Whole runs in which memory runs out at random places.")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    drawn = random.Random(given.seed)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="shortages-") as name:
        room = Path(name)
        os.environ["LOWRES_FT_CACHE"] = str(room / "cache")
        recipe = conftest.recipe(tiny.base(room / "base"), tiny.reviews(room / "reviews.csv"), *CHANGES)
        disturbed = Disturbed(recipe, room)
        parts = list(disturbed.parts)
        for number in range(given.runs):
            part = parts[number % len(parts)]
            several = disturbed.parts[part]
            at = {drawn.choice(several) for _ in range(1 + 2 * (number // len(parts) % 2))}
            came = disturbed.outcome(str(number), at, KINDS[number % len(KINDS)])
            counts[f"{part}, {'once' if len(at) == 1 else 'more'}", came.partition(" (")[0].partition(":")[0]] += 1
            print(f"run {number + 1}: {part}, {came}", file=sys.stderr, flush=True)
    for where, what in sorted(counts):
        print(f"{where:<20} {what:<10} {counts[where, what]}")
    wrong = sum(count for (_, what), count in counts.items() if what == "wrong")
    print(f"{given.runs} runs, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
