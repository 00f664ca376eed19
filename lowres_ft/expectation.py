"""What a run is expected to take: told from its plan and the lengths of its rows, before a weight is read."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from lowres_ft import budget, memory, pace, profiles, simulate, speed, timings
from lowres_ft.bases import Base
from lowres_ft.course import Course
from lowres_ft.device import Machine
from lowres_ft.errors import LowresError
from lowres_ft.memory import Memory
from lowres_ft.pace import Pace
from lowres_ft.plan import Plan
from lowres_ft.profiles import Profile
from lowres_ft.recipe import Recipe


@dataclass(frozen=True)
class Expected:
    """Memory and time of a run; None where they could not be told."""

    course: Course
    memory: Memory | None = None
    pace: Pace | None = None
    untold: str = ""
    """Why not, in words."""

    @property
    def seconds(self) -> float | None:
        """Of all training steps."""
        return None if self.pace is None else self.course.training(self.pace)

    def to_json(self) -> dict[str, Any]:
        """What report.json says of it under `plan`."""
        told = self.memory
        terms = {} if told is None else {"memory": told.terms | {"loading": told.loading}}
        return {"memory_bytes": None if told is None else told.total, "seconds": self.seconds, **terms}


def expect(recipe: Recipe, base: Base, profile: Profile, plan: Plan, machine: Machine, course: Course) -> Expected:
    """What a plan comes to; accounted for once on a machine, and kept.

    A base whose code does not run without its weights is none that cannot be trained: of it nothing is told.

    Raises:
        LowresError: It cannot be trained as asked.
    """
    rates = speed.known(machine)

    def account() -> dict[str, Any]:
        needed, long = memory.estimate(recipe, base, profile, plan, course.micro_batches, goes_on=course.goes_on)
        typical = long
        if course.typical != (long.rows, long.width):
            typical = simulate.account(recipe, base, profile, plan, *course.typical)
        trained = profiles.trainable(recipe.method, profile)
        found = pace.told(long, typical, plan, rates, trained, speed.share(recipe, plan.device))
        return {"memory": asdict(needed), "pace": found.model_dump(exclude={"measured"})}

    parts = recipe.model_dump(mode="json", include={"task", "model", "method"})
    train = recipe.train.model_dump(mode="json", include={"batch_size", "optimizer"})
    flags = [recipe.data.validation is None, recipe.budget.memory is None]
    known = [parts, train, flags, base.identity(), plan.model_dump(mode="json")]
    steps = [course.micro_batches, course.typical, course.goes_on]
    what = json.dumps(["expected", *known, *steps, rates.model_dump(), *memory.basis()])
    try:
        found = timings.once(machine, plan.dtype, what, account)
        return Expected(course, Memory(**found["memory"]), Pace.model_validate(found["pace"]))
    except LowresError:
        raise
    except Exception as error:  # noqa: BLE001 (whatever a model's code does without memory; with it, it may well run)
        return Expected(course, untold=budget.untold(error))
