"""How well the time of a step is known before a run: `python -m benchmarks.pace [--fit] [--work FOLDER]`.

It reads the runs of `benchmarks.memory` from their folder: those that fit constants there do so here, the others
judge. `--fit` finds which share of its best a processor reaches (`speed.Share`), and writes it to
`lowres_ft/tables/speed.json`. The runs must have had the machine to themselves. First steps, after which not all
kernels and memory are ready, do not count.
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from benchmarks.memory import Known
from benchmarks.memory_runs import FITTED, JUDGED, Run
from lowres_ft import device, files, pace, profiles, simulate, speed
from lowres_ft.pace import Shape
from lowres_ft.plan import Plan
from lowres_ft.simulate import Account
from lowres_ft.speed import Share

_START = 1e-6  # seconds that an operation takes at least to be started
_TABLE = Path(speed.__file__).parent / "tables" / "speed.json"


@dataclass(frozen=True)
class Timed:
    """A run, its accounts, and what its steps took."""

    run: Run
    plan: Plan
    long: Account
    typical: Account
    trained: int
    steps: list[tuple[list[Shape], float]]
    """Micro-batches of each step but the first, and its seconds."""

    @property
    def measured(self) -> float:
        """Seconds of the steps."""
        return sum(seconds for _, seconds in self.steps)

    def told(self, rates: speed.Rates, share: Share) -> float:
        """Seconds of the steps at a share of a machine's rates."""
        found = pace.told(self.long, self.typical, self.plan, rates, self.trained, share)
        return sum(sum(map(found.seconds, shapes)) + found.update for shapes, _ in self.steps)


def timed(run: Run, work: Path) -> Timed:
    """A run that lies in the folder of work."""
    known = Known.of(run, work)
    _, long = known.estimate()
    typical = simulate.account(known.recipe, known.base, known.profile, known.plan, *known.found["typical"])
    steps = [([(rows, width) for rows, width in cut], seconds) for cut, seconds in known.found["steps"][1:]]
    return Timed(run, known.plan, long, typical, profiles.trainable(known.recipe.method, known.profile), steps)


def fit(runs: list[Timed], rates: speed.Rates, start: Share) -> Share:
    """Least squares of the logarithms of told over measured; a run that lies far off counts less."""
    names = list(Share.model_fields)

    def share(logs: np.ndarray) -> Share:
        return Share(**dict(zip(names, np.exp(logs), strict=True)))

    def errors(logs: np.ndarray) -> list[float]:
        return [float(np.log(one.told(rates, share(logs)) / one.measured)) for one in runs]

    first = np.log([getattr(start, name) for name in names])
    least = [np.log(_START) if name == "start" else -np.inf for name in names]
    found = least_squares(errors, first, bounds=(least, np.inf), loss="soft_l1", f_scale=0.2)
    return Share(**{name: float(f"{value:.3g}") for name, value in zip(names, np.exp(found.x), strict=True)})


def main() -> None:
    parser = argparse.ArgumentParser(description="Time that was told, beside time that was measured.")
    parser.add_argument("--fit", action="store_true", help="Fit the shares first, and write them.")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/memory"), help="Where the runs lie.")
    parser.add_argument("--out", type=Path, help="Where to write the record.")
    given = parser.parse_args()
    rates, share = speed.known(device.find("cpu")), Share.of("cpu")
    fitted, judged = (
        [timed(run, given.work) for run in runs if (given.work / f"{run.key}.json").exists()]
        for runs in (FITTED, JUDGED)
    )
    if given.fit:
        share = fit(fitted, rates, share)
        files.write_json(_TABLE, json.loads(_TABLE.read_bytes()) | {"cpu": share.model_dump()})
    record: list[dict[str, Any]] = []
    for name, runs in filter(itemgetter(1), (("fitted", fitted), ("judged", judged))):
        print(f"{name:<90} {'told':>8} {'measured':>8}  error")
        errors = []
        for one in runs:
            told = one.told(rates, share)
            errors.append(told / one.measured - 1)
            print(f"{one.run.name:<90} {told:>7.1f}s {one.measured:>7.1f}s  {errors[-1]:+.1%}")
            record.append({"run": one.run.name, "for": name, "told": told, "measured": one.measured})
        sizes = [abs(error) for error in errors]
        print(f"{'':<90} median {statistics.median(sizes):.1%}, worst {max(sizes):.1%}")
    if given.out:
        about = {"versions": device.versions(), "rates": rates.model_dump(), "share": share.model_dump()}
        files.write_json(given.out, about | {"runs": record})


if __name__ == "__main__":
    main()
