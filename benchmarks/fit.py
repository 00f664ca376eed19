"""What is told of memory and time, fitted to whole runs: `python -m benchmarks.fit [--write] [--work F] [--out FILE]`.

Memory: what a process takes beside its tensors (`lowres_ft/tables/memory.json`), and of other runs what one takes that
is bound. Time: the share of its best that a processor reaches (`lowres_ft/tables/speed.json`), on this machine and on
those whose records stand `--beside`. The tables change with `--write` alone; what is shown is told by them as they then
are. A run's first step, by which not all kernels and memory are ready, does not count. Nothing else may run: time
counts, and memory is given back by the clock.

Runs are those of the command line, in whose process malloc sets no small blocks aside (`allocator.restart`). With
`--aside` they are those of a program that imports lowres_ft, in a folder of their own.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from scipy.optimize import least_squares, nnls

from benchmarks.known import Known
from benchmarks.runs import BOUND, FITTED
from lowres_ft import allocator, device, files, memory, pace, profiles, simulate, speed, tables
from lowres_ft.memory import Fitted
from lowres_ft.pace import Shape
from lowres_ft.simulate import Account
from lowres_ft.speed import Rates, Share

_START = 1e-6  # seconds that an operation takes at least to be started
_TABLES = Path(tables.__file__).parent


@dataclass(frozen=True)
class Held:
    """Memory of a run."""

    peak: int
    tensors: int
    """Bytes of it that follow from the account of a step."""
    in_heap: float
    """Most bytes that a micro-batch has in the heap."""
    heap: str
    """What lies there: its kind, as `memory.heap` tells."""
    single: bool
    """Whether fp32 computes."""
    grown: int
    """Bytes of the peak that came after the run's probe, beside the copy of its best step."""

    @classmethod
    def of(cls, known: Known) -> "Held":
        """That of a run that was done."""
        told, account = known.told
        kind = memory.heap(known.recipe, known.profile, known.plan)
        return cls(
            peak=known.peak,
            tensors=sum(size for name, size in told.terms.items() if name not in ("libraries", "allocator")),
            in_heap=memory.in_heap(account, kind, known.course.micro_batches),
            heap=kind,
            single=known.plan.dtype == "float32",
            grown=known.peak - known.probed - told.best,
        )


def constants(runs: Sequence[Held]) -> dict[str, dict[str, float]]:
    """Least squares of relative errors, none below 0: by the kind of heap, of which pieces alone are its own."""
    kinds = sorted({one.heap for one in runs})
    columns = [[1.0, not one.single, *(one.in_heap * (one.heap == kind) for kind in kinds)] for one in runs]
    rest = np.array([one.peak - one.tensors for one in runs])
    weights = 1 / np.array([one.peak for one in runs])
    (libraries, sixteen, *kept), _ = nnls(np.array(columns) * weights[:, None], rest * weights)
    shared = {"libraries": round(libraries)}
    if not all(one.single for one in runs):  # else none tells of 16 bits
        shared["sixteen"] = round(sixteen)
    found = {}
    for kind, fragmentation in zip(kinds, map(float, kept), strict=True):
        several = [one for one in runs if one.heap == kind]
        own = {"fragmentation": round(fragmentation, 3), "growth": _growth(several, sixteen, fragmentation)}
        found[kind] = shared | own
    return found


def _growth(several: Sequence[Held], sixteen: float, fragmentation: float) -> float:
    """The share of what a kind of heap keeps in pieces that comes after a run's probe, by least squares as above."""
    kept = np.array([(sixteen * (not one.single) + fragmentation * one.in_heap) / one.peak for one in several])
    grown = np.array([one.grown / one.peak for one in several])
    (share,), _ = nnls(kept[:, None], grown)
    return round(float(share), 3)


def left_out(runs: Sequence[Held]) -> tuple[float, float]:
    """Errors (root mean square) of what is told, and of what a probe measured with what comes later.

    Each run is told by constants that were fitted to the others, of which one has its kind of heap.
    """
    errors = []
    for at, one in enumerate(runs):
        found = constants([*runs[:at], *runs[at + 1 :]])[one.heap]
        pieces = (0.0 if one.single else found["sixteen"]) + found["fragmentation"] * one.in_heap
        told = one.tensors + found["libraries"] + pieces
        measured = one.peak - one.grown + found["growth"] * pieces
        errors.append((told / one.peak - 1, measured / one.peak - 1))
    before, after = np.sqrt(np.mean(np.square(errors), axis=0))
    return float(before), float(after)


@dataclass(frozen=True)
class Timed:
    """Steps of a run, by what is told of them and what they took."""

    known: Known

    @property
    def measured(self) -> float:
        """Seconds of all steps but the first."""
        return sum(self.known.steps[1:])

    @property
    def steps(self) -> tuple[tuple[Shape, ...], ...]:
        """Micro-batches of each of them."""
        return self.known.course.sample[1:]

    @cached_property
    def long(self) -> Account:
        """Of the micro-batch that needs most memory."""
        return self.known.told[1]

    @cached_property
    def typical(self) -> Account:
        """Of the micro-batch in the middle."""
        known = self.known
        return simulate.account(known.recipe, known.base, known.profile, known.plan, *known.course.typical)

    def told(self, rates: Rates, share: Share) -> float:
        """Seconds of the steps at a share of a machine's rates."""
        known = self.known
        trained = profiles.trainable(known.recipe.method, known.profile)
        found = pace.told(self.long, self.typical, known.plan, rates, trained, share)
        return sum(sum(map(found.seconds, shapes)) + found.update for shapes in self.steps)


@dataclass(frozen=True)
class Seen:
    """A run on a machine."""

    run: Timed
    rates: Rates
    seconds: float
    """Of all steps but the first."""

    @classmethod
    def of(cls, several: Sequence[Known], rates: Rates, records: Sequence[dict[str, Any]]) -> list[Self]:
        """Some runs on this machine, and on others as far as their records have them."""
        timed = [Timed(known) for known in several]
        found = [cls(one, rates, one.measured) for one in timed]
        for record in records:
            took = {one["run"]: one["measured"]["seconds"] for one in record["runs"]}
            theirs = Rates.model_validate(record["rates"])
            found += [cls(one, theirs, took[name]) for one in timed if (name := one.known.run.name) in took]
        return found


def reached(several: Sequence[Seen], start: Share) -> Share:
    """Least squares of the logarithms of told over measured; a run that lies far off counts less.

    No share is above 1, and no function is faster for its bytes than what only moves them.
    """
    names = list(Share.model_fields)
    moving, functions = names.index("bandwidth"), names.index("functions")

    def share(logs: np.ndarray) -> Share:
        values = np.exp(logs)
        values[functions] *= values[moving]
        return Share(**dict(zip(names, values, strict=True)))

    def errors(logs: np.ndarray) -> list[float]:
        return [float(np.log(one.run.told(one.rates, share(logs)) / one.seconds)) for one in several]

    first = np.log([getattr(start, name) for name in names])
    first[functions] -= first[moving]
    least = [np.log(_START) if name == "start" else -np.inf for name in names]
    most = [np.inf if name == "start" else 0.0 for name in names]
    found = least_squares(errors, np.minimum(first, most), bounds=(least, most), loss="soft_l1", f_scale=0.2)
    return Share(**{name: float(f"{value:.3g}") for name, value in share(found.x).model_dump().items()})


def _grown(runs: Sequence[Held]) -> dict[str, dict[str, float]]:
    """The share of pieces that comes after a probe, for each kind of heap, by the other constants as they stand."""
    found = {}
    for kind in sorted({one.heap for one in runs}):
        fitted = Fitted.of(kind)
        several = [one for one in runs if one.heap == kind]
        found[kind] = {"growth": _growth(several, fitted.sixteen, fitted.fragmentation)}
    return found


def _write_memory(several: Sequence[Sequence[Known]], *, growth_alone: bool) -> None:
    """Write the table of memory: of commands and of bound ones, or of programs whose malloc sets blocks aside."""
    table = tables.read("memory")
    for runs in filter(None, several):
        found = (_grown if growth_alone else constants)([Held.of(known) for known in runs])
        table |= {kind: table[kind] | of for kind, of in found.items()}
    files.write_json(_TABLES / "memory.json", table)


def _write_speed(timed: Mapping[str, Sequence[Seen]]) -> None:
    """Write the table of speed: the share of each kind of process."""
    shares = {kind: reached(several, Share.of(kind)).model_dump() for kind, several in timed.items()}
    files.write_json(_TABLES / "speed.json", tables.read("speed") | shares)


def _record(known: Known, rates: Rates) -> dict[str, Any]:
    """What is told of a run by the tables as they are, and what was measured."""
    told, _ = known.told
    timed = Timed(known)
    seconds = timed.told(rates, speed.share(known.recipe, known.plan.device))
    return {
        "run": known.run.name,
        "told": {"memory_bytes": told.total, "seconds": seconds, "terms": told.to_json()},
        "measured": {"memory_bytes": known.peak, "seconds": timed.measured},
    }


def _show(record: Sequence[dict[str, Any]]) -> None:
    errors: dict[str, list[float]] = {"memory_bytes": [], "seconds": []}
    for one in record:
        for name, found in errors.items():
            found.append(one["told"][name] / one["measured"][name] - 1)
        measured = one["measured"]
        print(
            f"{one['run']:<86} {measured['memory_bytes'] / 1e6:>6.0f} MB {errors['memory_bytes'][-1]:>+7.1%}"
            f" {measured['seconds']:>7.1f} s {errors['seconds'][-1]:>+7.1%}"
        )
    for name, found in errors.items():
        sizes = [abs(error) for error in found]
        print(f"{name}: median {statistics.median(sizes):.1%}, worst {max(sizes):.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description="What is told of memory and time, fitted to whole runs.")
    parser.add_argument(
        "--write",
        nargs="*",
        choices=("memory", "growth", "speed"),
        help="Write the tables by which runs are told, or one of them; growth: of memory's what comes after a probe.",
    )
    parser.add_argument(
        "--beside", type=Path, nargs="*", default=[], help="Records of other machines, whose times are fitted too."
    )
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/whole"), help="Where bases and runs lie.")
    parser.add_argument("--out", type=Path, help="Where to write the record.")
    parser.add_argument("--aside", action="store_true", help="Runs whose malloc sets small blocks aside.")
    given = parser.parse_args()
    if not given.aside:
        allocator.restart()
    work = given.work / "aside" if given.aside else given.work
    work.mkdir(parents=True, exist_ok=True)
    rates = speed.known(device.find("cpu"))
    runs, bound = ([Known.of(run, work) for run in several] for several in (FITTED, () if given.aside else BOUND))
    written = {"memory", "speed"} if given.write == [] else set(given.write or [])
    if written & {"memory", "growth"}:
        _write_memory((runs, bound), growth_alone="memory" not in written)
    if "speed" in written:
        others = [json.loads(path.read_bytes()) for path in given.beside]
        kinds = {"aside": runs} if given.aside else {"cpu": runs, "bound": bound}
        _write_speed({kind: Seen.of(several, rates, others) for kind, several in kinds.items()})
    record = [_record(known, rates) for known in (*runs, *bound)]
    _show(record)
    before, after = left_out([Held.of(known) for known in runs])
    share = after**2 / (before**2 + after**2)
    print(f"left out in turn: told {before:.1%} off, after a probe {after:.1%}, by which told counts for {share:.2f}")
    if given.out:
        about = {"versions": device.versions(), "rates": rates.model_dump(), "shares": tables.read("speed")}
        files.write_json(given.out, about | {"runs": record})


if __name__ == "__main__":
    main()
