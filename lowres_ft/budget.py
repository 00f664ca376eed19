"""What to do when a run does not fit: the plan is made more frugal, in the order of what that costs in time.

First micro-batches get smaller, which costs little while they hold some hundred tokens; then activations are computed
again, of a selection and then of whole layers; then attention is; at last layers pass through room for two of them.
None of it changes the result beyond rounding. What would change it, such as quantizing the base, is for the recipe to
say: an error lists what each such change saves.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lowres_ft import bases, device, memory, profiles
from lowres_ft import plan as made
from lowres_ft.bases import Base
from lowres_ft.device import Machine
from lowres_ft.errors import LowresError, ModelError
from lowres_ft.plan import Plan, why_resident
from lowres_ft.profiles import Profile
from lowres_ft.recipe import Recipe
from lowres_ft.sizes import parse_bytes, show_bytes

Needs = Callable[[Recipe, Plan], int]
"""Bytes that a recipe needs at its peak by a plan."""
_FEW_TOKENS = 256  # of a micro-batch, below which products get slow and little is saved


@dataclass(frozen=True)
class Remedy:
    """A change of the recipe by which a run takes less."""

    change: str
    saves: int


def room(recipe: Recipe, machine: Machine) -> int | None:
    """Bytes that a recipe may take on a machine; None where it sets no bound."""
    if recipe.budget.memory is None:
        return None
    return device.free_bytes(machine.device) if recipe.budget.memory == "auto" else parse_bytes(recipe.budget.memory)


def within(
    recipe: Recipe, base: Base, profile: Profile, plan: Plan, machine: Machine, lengths: Sequence[int] = ()
) -> Plan:
    """The plan, made as frugal as the recipe's budget of memory asks for.

    Texts have `lengths`, or are as long as the recipe lets them be.

    Raises:
        ModelError: No plan fits; the message lists changes of the recipe and what each of them saves.
    """
    most = room(recipe, machine)
    if most is None:
        return plan
    return settle(
        recipe, plan, profile, most, lambda one, by: memory.estimate(one, base, profile, by, lengths)[0].total
    )


def settle(recipe: Recipe, plan: Plan, profile: Profile, most: int, needs: Needs) -> Plan:
    """The first of `plans` that needs at most so many bytes.

    Raises:
        ModelError: None does.
    """
    least, last = 0, plan
    for last in plans(recipe, plan, profile):
        if (least := needs(recipe, last)) <= most:
            return last
    listed = _listed(remedies(recipe, last, least, needs))
    raise ModelError(
        f"this run needs {show_bytes(least)} at least, and may take {show_bytes(most)}",
        hint=listed or "Use a smaller base.",
    )


def _listed(found: Sequence[Remedy]) -> str:
    return "; ".join(f"{one.change} saves {show_bytes(one.saves)}" for one in found)


def advice(recipe: Recipe, machine: Machine) -> str:
    """What changes of a recipe would save by the most frugal plan, in words; for a run whose memory ran out."""
    other = "Give it more memory, or use a smaller base or a smaller task.max_length."
    try:
        base = bases.resolve(recipe.model)
        profile = profiles.profile(base, recipe.task)
        needs: Needs = lambda one, by: memory.estimate(one, base, profile, by)[0].total  # noqa: E731
        *_, last = plans(recipe, made.make(recipe, profile, machine), profile)
        found = remedies(recipe, last, needs(recipe, last), needs)
    except (LowresError, MemoryError, RuntimeError):  # there is no memory even for that
        return other
    return _listed(found) or other


def plans(recipe: Recipe, plan: Plan, profile: Profile) -> Iterator[Plan]:
    """Yield a plan and then more frugal ones, those that cost little first."""
    yield plan
    while plan.micro_batch_tokens > max(_FEW_TOKENS, recipe.task.max_length) and not plan.pinned_cut:
        tokens = max(_FEW_TOKENS, plan.micro_batch_tokens // 2)
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


def remedies(recipe: Recipe, plan: Plan, now: int, needs: Needs) -> list[Remedy]:
    """Changes of a recipe that needs so many bytes `now`, by what each saves on its own, most first."""
    found = []
    for change, changed in _changed(recipe, plan):
        try:
            saves = now - needs(changed, plan)
        except LowresError:  # it cannot be on this base
            continue
        if saves > 0:
            found.append(Remedy(change, saves))
    return sorted(found, key=lambda remedy: -remedy.saves)


def _changed(recipe: Recipe, plan: Plan) -> Iterator[tuple[str, Recipe]]:
    """Recipes that take less, each by one change."""

    def part(name: str, **update: object) -> Recipe:
        return recipe.model_copy(update={name: getattr(recipe, name).model_copy(update=update)})

    if recipe.method.trains_base:
        from lowres_ft.methods.lora import Lora

        yield "method.kind=lora", recipe.model_copy(update={"method": Lora()})
    else:
        forms: Sequence[str] = {"none": ("int8", "nf4"), "int8": ("nf4",)}.get(recipe.model.quantize, ())
        for form in forms:
            if recipe.method.conflict(form) is None:
                yield f"model.quantize={form}", part("model", quantize=form)
        if recipe.model.quantize != "none" and not recipe.model.quantize_embeddings:
            yield "model.quantize_embeddings=true", part("model", quantize_embeddings=True)
        if (rank := getattr(recipe.method, "rank", 1)) > 1:
            yield f"method.rank={rank // 2}", part("method", rank=rank // 2)
    if recipe.task.max_length > 1:
        shorter = recipe.task.max_length // 2
        yield f"task.max_length={shorter}", part("task", max_length=shorter)
    if recipe.train.optimizer == "adamw" and plan.device.startswith("cuda"):
        yield "train.optimizer=adamw8bit", part("train", optimizer="adamw8bit")
