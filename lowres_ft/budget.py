"""What to do when a run does not fit: the plan is made more frugal, in the order of what that costs in time.

First micro-batches get smaller, which costs little while they hold some hundred tokens; then activations are computed
again, of a selection and then of whole layers; then attention is; at last layers pass through room for two of them.
None of it changes the result beyond rounding. What would change it, such as quantizing the base, is for the recipe to
say: an error lists what each such change saves.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

from lowres_ft import bases, changes, device, limits, memory, outside, profiles, shortage
from lowres_ft import plan as made
from lowres_ft.bases import Base
from lowres_ft.device import Machine
from lowres_ft.errors import LowresError, ModelError, first_line
from lowres_ft.memory import Memory
from lowres_ft.pace import Shape
from lowres_ft.plan import Plan, why_resident
from lowres_ft.profiles import Profile
from lowres_ft.recipe import Recipe
from lowres_ft.simulate import Account
from lowres_ft.sizes import parse_bytes, show_bytes

Needs = Callable[[Recipe, Plan], int]
"""Bytes that a recipe needs at its peak by a plan."""
Shapes = Callable[[Recipe, Plan], Sequence[Shape]]
"""The micro-batches into which a plan cuts a recipe's rows; none where the rows are not known."""
FEW_TOKENS = 256  # of a micro-batch, below which products get slow and little is saved
_NEARLY = 1.1  # times what a run may take


def unknown(*_: object) -> Sequence[Shape]:
    """Of rows that were not read: texts are as long as the recipe lets them be."""
    return ()


def room(recipe: Recipe, machine: Machine) -> int | None:
    """Bytes that a recipe may take on a machine, as it says and the system lets it; None where it sets no bound."""
    if recipe.budget.memory is None:
        return None
    most = _told(recipe.budget.memory, machine)
    return max(1, outside.within(most) if machine.kind == "cpu" else most)


def _told(memory: str, machine: Machine) -> int:
    """Bytes that a budget names, or that are free but for a reserve."""
    if memory != "auto":
        return parse_bytes(memory)
    reserve = limits.reserve(device.total_bytes(machine.device))
    # Each process of a host leaves its share of what is left to others; a GPU is of one process.
    reserve //= device.local_processes() if machine.kind == "cpu" else 1
    return device.free_bytes(machine.device) - reserve


def within(
    recipe: Recipe,
    base: Base,
    profile: Profile,
    plan: Plan,
    machine: Machine,
    shapes: Shapes = unknown,
) -> Plan:
    """The plan, made as frugal as the recipe's budget of memory asks for.

    `shapes` says into what a plan cuts the rows; else texts are as long as the recipe lets them be.

    Raises:
        ModelError: No plan fits; the message lists changes of the recipe and what each of them saves.
    """
    most = room(recipe, machine)
    if most is None:
        return plan
    return settle(recipe, plan, profile, most, Accounts(base, profile, shapes).bytes)


class Accounts:
    """What a run needs by each recipe and plan that is asked for, accounted for once."""

    def __init__(self, base: Base, profile: Profile, shapes: Shapes = unknown) -> None:
        self.base, self.profile, self.shapes = base, profile, shapes
        self.known: dict[tuple[str, str], tuple[Memory, Account] | LowresError] = {}

    def of(self, recipe: Recipe, plan: Plan) -> tuple[Memory, Account]:
        """The memory of a run, and the account of the micro-batch that needs most.

        Raises:
            ModelError: The base cannot be adapted as asked, or its code does not run without its weights.
        """
        key = recipe.model_dump_json(), plan.model_dump_json()
        if key not in self.known:
            self.known[key] = self._found(recipe, plan)
        found = self.known[key]
        if isinstance(found, LowresError):
            raise found
        return found

    def _found(self, recipe: Recipe, plan: Plan) -> tuple[Memory, Account] | LowresError:
        try:
            return memory.estimate(recipe, self.base, self.profile, plan, self.shapes(recipe, plan))
        except LowresError as error:
            return error
        except Exception as error:  # whatever a model's code does without its weights
            if shortage.ran_out(error):
                raise
            return ModelError(untold(error), hint="A run without budget.memory may well work.")

    def bytes(self, recipe: Recipe, plan: Plan) -> int:
        """What a run has to be given: its peak, what an account may err by, and on a processor what a bound spares."""
        return limits.given(self.of(recipe, plan)[0].total, plan.device)


def untold(error: Exception) -> str:
    """Why it is not known what a run takes, in words."""
    return f"what this base takes cannot be told before it runs: {first_line(error)}"


def settle(recipe: Recipe, plan: Plan, profile: Profile, most: int, needs: Needs) -> Plan:
    """The first of `plans` that needs at most so many bytes, each of which is taken to need less than the one before.

    Raises:
        ModelError: None does.
    """
    several = list(plans(recipe, plan, profile))
    if needs(recipe, plan) <= most:
        return plan
    last = several[-1]
    if (least := needs(recipe, last)) <= most:
        at = bisect_left(several, True, hi=len(several) - 1, key=lambda one: needs(recipe, one) <= most)
        return several[at]
    if (found := _less(recipe, several, most, needs)) is not None:
        return found

    def frugal(changed: Recipe) -> int:
        *_others, by = plans(changed, _by(changed, plan), profile)
        return needs(changed, by)

    fewer = changes.Ways(last.dtype, last.device, frugal)
    told = f"{fewer.listed(recipe, least)}; {fewer.together(recipe, least, most).told(most)}".strip("; ")
    by = outside.named(most) if plan.device == "cpu" else ""
    raise ModelError(
        f"this run needs {show_bytes(least)} at least, and may take {show_bytes(most)}{by}",
        hint=told or "Use a smaller base.",
    )


def _less(recipe: Recipe, several: Sequence[Plan], most: int, needs: Needs) -> Plan | None:
    """A plan that fits though the last one does not: where a layer is small, a more frugal one may need a little more.

    It is looked for from the last one on, as long as they nearly fit.
    """
    found = None
    for one in reversed(several):
        if (needed := needs(recipe, one)) <= most:
            found = one
        elif found is not None or needed > _NEARLY * most:
            break
    return found


def advice(recipe: Recipe, machine: Machine) -> str:
    """What changes of a recipe would save by the most frugal plan, in words; for a run whose memory ran out."""
    other = "Give it more memory, or use a smaller base or a smaller task.max_length."
    try:
        base = bases.resolve(recipe.model)
        profile = profiles.profile(base, recipe.task)
        needs = Accounts(base, profile).bytes
        *_, last = plans(recipe, made.make(recipe, profile, machine), profile)
        listed = ways(last, needs).listed(recipe, needs(recipe, last))
    except (LowresError, MemoryError, RuntimeError):  # there is no memory even for that
        listed = ""
    return ". ".join([*_counted(recipe, machine), listed or other])


def _counted(recipe: Recipe, machine: Machine) -> list[str]:
    """What makes a plan count with limits that the system sets, where it does not."""
    if recipe.budget.memory is not None or machine.kind != "cpu":
        return []
    return [
        f"With budget.memory=auto the plan counts with {limit.name}, which the system sets" for limit in outside.found()
    ]


def plans(recipe: Recipe, plan: Plan, profile: Profile) -> Iterator[Plan]:
    """Yield a plan and then more frugal ones, those that cost little first."""
    yield plan
    while plan.micro_batch_tokens > max(FEW_TOKENS, recipe.task.max_length) and not plan.pinned_cut:
        tokens = max(FEW_TOKENS, plan.micro_batch_tokens // 2)
        plan = plan.model_copy(update={"micro_batch_tokens": tokens, "evaluation_tokens": 2 * tokens})
        yield plan
    if recipe.budget.recompute == "auto" and profile.stack is not None:
        for how in ("selective", "layers"):
            plan = plan.model_copy(update={"recompute": how})
            yield plan
    if "kept" in plan.attention_kernels.values():
        again = {
            length: "recomputed" if kernel == "kept" else kernel for length, kernel in plan.attention_kernels.items()
        }
        plan = plan.model_copy(update={"attention_kernels": again})
        yield plan
    if recipe.budget.offload == "auto" and not why_resident(recipe, profile, plan.device.partition(":")[0]):
        yield plan.model_copy(update={"offload": "layers"})


def ways(plan: Plan, needs: Needs) -> changes.Ways:
    """Changes of a recipe by which a run takes less by a plan."""
    return changes.Ways(plan.dtype, plan.device, lambda changed: needs(changed, _by(changed, plan)))


def _by(recipe: Recipe, plan: Plan) -> Plan:
    """The plan in the dtype that a recipe names, if it does."""
    return plan if recipe.model.dtype == "auto" else plan.model_copy(update={"dtype": recipe.model.dtype})
