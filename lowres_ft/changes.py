"""Changes of a recipe by which a run takes less memory, and another result: they are for its author to make."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lowres_ft.errors import LowresError
from lowres_ft.recipe import Recipe
from lowres_ft.sizes import show_bytes

Needed = Callable[[Recipe], int]
"""Bytes that a recipe needs; a LowresError where its base cannot be held so."""
_SHORTEST = 16  # tokens: texts cut to fewer say little
_LEAST_SAVED = 2**20  # bytes for which a change is worth making, beside others


def frugal(recipe: Recipe, dtype: str, device: str) -> Iterator[tuple[str, Recipe]]:
    """Yield an override and the recipe with it, for each change by itself, of a run that computes in a dtype."""

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
        if dtype == "float32":
            yield "model.dtype=bfloat16", part("model", dtype="bfloat16")
        if (rank := getattr(recipe.method, "rank", 1)) > 1:
            yield f"method.rank={rank // 2}", part("method", rank=rank // 2)
    if recipe.task.max_length > 1:
        shorter = recipe.task.max_length // 2
        yield f"task.max_length={shorter}", part("task", max_length=shorter)
    if recipe.train.optimizer == "adamw" and device.startswith("cuda"):
        yield "train.optimizer=adamw8bit", part("train", optimizer="adamw8bit")


@dataclass(frozen=True)
class Remedy:
    """A change of the recipe by which a run takes less."""

    change: str
    saves: int


@dataclass(frozen=True)
class Together:
    """Several changes of a recipe, and the bytes that it needs so."""

    changes: tuple[str, ...]
    needs: int

    def told(self, most: int) -> str:
        """In words, for a run that may take `most` bytes; none without a change."""
        if not self.changes:
            return ""
        several = "all of it together" if self.needs > most else "together"
        which = several if len(self.changes) > 1 else "alone"
        told = f"{' '.join(self.changes)} {which} makes it {show_bytes(self.needs)}"
        return f"{told}, which is still too much: use a smaller base" if self.needs > most else f"{told}, which fits"


@dataclass(frozen=True)
class Ways:
    """Changes of a recipe that computes in a dtype on a device, and what it needs by each."""

    dtype: str
    device: str
    needs: Needed

    def remedies(self, recipe: Recipe, now: int) -> list[Remedy]:
        """Changes of a recipe that needs so many bytes `now`, by what each saves on its own, most first."""
        found = [Remedy(change, now - needed) for needed, change in self._needed(recipe) if needed < now]
        return sorted(found, key=lambda remedy: -remedy.saves)

    def listed(self, recipe: Recipe, now: int) -> str:
        """The same in words."""
        return "; ".join(f"{one.change} saves {show_bytes(one.saves)}" for one in self.remedies(recipe, now))

    def together(self, recipe: Recipe, now: int, most: int) -> Together:
        """Changes that bring a recipe from `now` bytes to `most`, those that save most first.

        Where no changes do, all that are worth it. What a change saved before others were made is taken for the most
        that it can save: it is accounted for again when none is known to save more.
        """
        chosen: dict[str, str] = {}
        savings: dict[str, float] = {}
        while now > most and (found := self._best(recipe, now, savings)) is not None:
            now, change, recipe = found
            chosen[change.partition("=")[0]] = change
        return Together(tuple(chosen.values()), now)

    def _needed(self, recipe: Recipe) -> Iterator[tuple[int, str]]:
        """Yield what a recipe needs after each change by itself, and the change."""
        for change, changed in frugal(recipe, self.dtype, self.device):
            try:
                needed = self.needs(changed)
            except LowresError:  # it cannot be on this base
                continue
            yield needed, change

    def _best(self, recipe: Recipe, now: int, savings: dict[str, float]) -> tuple[int, str, Recipe] | None:
        """What a recipe that needs `now` bytes needs after the change that saves most, that change, and the recipe so.

        `savings` is what each change saved when it was last accounted for. None where no change is worth it.
        """
        every = frugal(recipe, self.dtype, self.device)
        several = {change: changed for change, changed in every if changed.task.max_length >= _SHORTEST}
        looked: dict[str, int] = {}
        while several:
            change = max(several, key=lambda one: savings.get(one, math.inf))
            if savings.get(change, math.inf) < _LEAST_SAVED:
                return None
            if change in looked:
                return looked[change], change, several[change]
            try:
                looked[change] = self.needs(several[change])
                savings[change] = now - looked[change]
            except LowresError:  # it cannot be on this base
                del several[change]
        return None
