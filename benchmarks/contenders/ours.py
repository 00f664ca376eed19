"""lowres-ft, along the path of `lowres-ft recipe` and of `lowres-ft predict`.

As there, lowres_ft is imported before PyTorch, which reads what it sets.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.job import Clock, Job, Made
from lowres_ft import batches, data, device, evaluate, preparing, train
from lowres_ft.bundle import open_bundle
from lowres_ft.model import Adapted
from lowres_ft.plan import Plan
from lowres_ft.recipe import Recipe, load_recipe
from lowres_ft.runs import run_folder

if TYPE_CHECKING:
    from torch import Tensor


def run(job: Job, clock: Clock) -> Made:
    """Train, or predict, and count the steps."""
    machine = device.find(job.device)
    recipe = recipe_of(job)
    with run_folder(recipe.name, job.folder / f"ours-{job.seed}-{job.contender.numbers}", machine) as place:
        if job.work.predicts:
            return _predict(job, clock, recipe, place.work)
        rows = data.load(recipe, place.work)
        resolved = recipe.model_copy(update={"task": rows.task})
        ready = preparing.prepare(resolved, rows, machine, place)
        state = train.start(ready.recipe, ready.adapted, ready.tokens["train"], ready.plan)
        for step in train.train(state, ready.tokens["train"], ready.plan, machine):
            clock.step(step.tokens)
    return _made(ready.adapted, ready.plan)


def recipe_of(job: Job) -> Recipe:
    """The work's recipe on the rows that were prepared."""
    quantize = "int8" if job.contender.numbers == "int8" else "none"
    changes = [f"data.train={job.folder / 'rows.jsonl'}", "data.validation=null", "data.test=null"]
    changes += [f"model.quantize={quantize}", f"model.dtype={job.contender.dtype}"]
    changes += [f"train.steps={job.total_steps}", f"train.batch_size={job.work.batch_size}", f"train.seed={job.seed}"]
    return load_recipe(job.work.recipe, [*job.work.overrides, *changes])


def _predict(job: Job, clock: Clock, recipe: Recipe, work: Path) -> Made:
    """Score the rows with the adapter that was prepared; the whole is one step, as a user sees it."""
    machine = device.find(job.device)
    adapted, plan = open_bundle(job.folder / "adapter").load(machine, dtype=recipe.model.dtype)  # type: ignore[arg-type]
    rows, _ = data.store(recipe.data.train, adapted.task, recipe.data.columns, work / "rows.arrow")
    tokens = batches.tokenize(adapted, rows, work / "rows")
    few = batches.tokenize(adapted, rows.take(np.arange(job.work.warmup * job.work.batch_size)), work / "few")
    for part in (few, tokens):
        evaluate.outputs(adapted, part, plan)
        clock.step(int(part.lengths.sum()))
    return _made(adapted, plan)


def _made(adapted: Adapted, plan: Plan) -> Made:
    model: Any = adapted.model.eval()
    trained = [*adapted.trained().values()]
    known = {id(parameter) for parameter in trained}
    held = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in known]
    adapters = [model.get_submodule(name) for name in adapted.adapted]

    def logits(ids: "Tensor", mask: "Tensor") -> "Tensor":
        with adapted.computing():
            found: Tensor = model(input_ids=ids, attention_mask=mask).logits
        return found

    return Made(
        logits=logits,
        pad=int(adapted.tokenizer.pad_token_id or 0),
        trainable_parameters=sum(parameter.numel() for parameter in trained),
        frozen_bytes=sum(tensor.nbytes for tensor in held),
        linear_bytes=sum(held.nbytes for layer in adapters for held in layer.storage.buffers()),
        plan=plan.model_dump(mode="json"),
    )
