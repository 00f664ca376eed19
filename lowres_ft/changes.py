"""Changes of a recipe by which a run takes less memory, and another result: they are for its author to make."""

from collections.abc import Iterator, Sequence

from lowres_ft.recipe import Recipe


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
