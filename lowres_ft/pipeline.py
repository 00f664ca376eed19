"""The pipeline: from a recipe to a bundle and its report."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from lowres_ft import (
    bases,
    batches,
    budget,
    bundle,
    card,
    checking,
    data,
    device,
    evaluate,
    exhibits,
    files,
    forked,
    generation,
    limits,
    page,
    preparing,
    probes,
    report,
    resuming,
    shortage,
)
from lowres_ft import contrast as contrasts
from lowres_ft.bundle import Bundle
from lowres_ft.contrast import Contrast, Probed
from lowres_ft.data import Data
from lowres_ft.device import Machine
from lowres_ft.errors import BundleError, OutOfMemoryError
from lowres_ft.evaluate import Baseline, Scores
from lowres_ft.events import Listener, Note, Stage, unheard
from lowres_ft.fitting import Ready, fit
from lowres_ft.probes import Probe
from lowres_ft.recipe import Recipe
from lowres_ft.report import Measured
from lowres_ft.runs import Place, Wish, run_folder
from lowres_ft.saving import Keeper
from lowres_ft.sizes import show_bytes, show_seconds
from lowres_ft.tasks.base import Ragged
from lowres_ft.tokenizing import load_tokenizer

T = TypeVar("T")


def run(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    resume: bool | None = None,
    device_name: str = "auto",
    listen: Listener = unheard,
) -> Bundle:
    """Train, evaluate and bundle a recipe; return the bundle, which stands at `out` (default `runs/<name>`).

    Started by accelerate's launcher, all processes share each step and the first one writes. An interrupted run goes
    on from its newest checkpoint with `resume=True` and begins anew with `resume=False`; else it is an error.

    Raises:
        LowresError: Something that the user can mend; its kind says what.
    """
    for text in recipe.notes:
        listen(Note(text))
    machine = device.find(device_name)
    limits.trim()
    device.forget_peak(machine.device)  # that of a run before, in the same process
    if machine.rank:
        listen = unheard
    with run_folder(recipe.name, out, machine, Wish(recipe, resume)) as place:
        for text in place.notes:
            listen(Note(text))
        if place.finished:
            listen(Note(f"{place.out} is the finished bundle of this recipe"))
        else:
            _run(recipe, machine, place, listen)
    device.wait_for_all(machine)
    return bundle.open_bundle(place.out)


def _run(recipe: Recipe, machine: Machine, place: Place, listen: Listener) -> None:
    listen(Stage(f"reading {recipe.data.train}"))
    rows = data.load(recipe, place.work, preparing.progress(listen))
    limits.trim()  # of what reading took, much more than the rows
    if not machine.rank:
        base = bases.resolve(recipe.model, preparing.progress(listen))
        told = resuming.note(place.folder, recipe, rows, base, machine, goes_on=place.found is not None)
        rows = replace(rows, notes=(*rows.notes, *told))
    for text in rows.notes:
        listen(Note(text))
    resolved = recipe.model_copy(update={"task": rows.task})
    with bounded(resolved, machine, listen):
        draft = _experiment(resolved, rows, machine, place, listen, resuming.digest(recipe))
        if draft is not None:
            limits.trim()
            shortage.twice(draft.describe, machine.device, "writing the report")
            listen(Stage("loading what was written, and comparing"))
            shortage.twice(partial(bundle.seal, draft.bundle, machine, draft.probe, draft.expected), machine.device)
            files.publish(place.draft, place.out)


@contextmanager
def bounded(recipe: Recipe, machine: Machine, listen: Listener) -> Iterator[None]:
    """Hold what is inside to a recipe's budget of memory; where memory runs out, say what changes would save.

    Raises:
        OutOfMemoryError: Memory ran out where nothing smaller could be tried.
    """
    most = budget.room(recipe, machine)
    with _remedied(recipe, machine), limits.held(most, machine.device, listen):
        yield


@contextmanager
def _remedied(recipe: Recipe, machine: Machine) -> Iterator[None]:
    """Say, where memory runs out, what changes of the recipe would save."""
    try:
        with shortage.named("neither training nor an evaluation could be made smaller"):
            yield
    except OutOfMemoryError as error:
        message, hint = error.message, error.hint
    else:
        return
    # Outside of the handler, whose error holds what filled the memory.
    shortage.release(machine.device)
    raise OutOfMemoryError(message, hint=hint or budget.advice(recipe, machine))


def _checked(ready: Ready, machine: Machine, listen: Listener) -> Ready:
    """Tell what deserves a look in the data, once."""
    told = () if machine.rank else tuple(checking.brief(ready.rows, ready.adapted.tokenizer))
    for text in told:
        listen(Note(text))
    return replace(ready, notes=(*ready.notes, *told))


@dataclass(frozen=True)
class _Draft:
    """A bundle of which weights and report.json are written, and what its model computed."""

    bundle: Bundle
    found: dict[str, Any]
    """What report.json holds."""
    pad: int | None
    """The token that pads, where it is not the base's."""
    ends: Sequence[int]
    """Tokens that end an answer, where the model by itself does not stop after each of them."""
    probe: Probe | None
    expected: Tensor | None

    def describe(self) -> None:
        """Write what people read, when the model is gone, and where there is room without libraries that stay."""
        folder, draw = self.bundle.folder, partial(page.render, self.found)
        try:
            drawn: str = forked.result(draw, brings=forked.MATPLOTLIB, room=limits.room_beside())
        except forked.NoRoomError:
            drawn = draw()
        files.write_bytes(folder / "report.html", drawn.encode())
        told = card.render(self.bundle, self.found, pad_token_id=self.pad, ends=self.ends)
        files.write_bytes(folder / "README.md", told.encode())


@dataclass(frozen=True)
class _Asked:
    """What a model was asked before training, and what it did."""

    contrast: Contrast
    before: Probed


def _experiment(
    resolved: Recipe, rows: Data, machine: Machine, place: Place, listen: Listener, digest: str
) -> _Draft | None:
    """Train, score and write. The model is freed with this function, so that the reloaded one has its room."""
    ready = _twice(partial(preparing.prepare, resolved, rows, machine, place, listen), machine, "preparing")
    ready = _checked(ready, machine, listen)
    ready = _twice(partial(preparing.tried, ready, machine, place, listen), machine, "trying the longest texts")
    asked = _twice(partial(_asked, ready, machine, listen), machine, "asking the untouched base")
    listen(Stage(f"training on {len(ready.tokens['train']):,} rows{_told(ready)}"))
    keeper = Keeper(place.checkpoints, resolved.train.checkpoint_every, place.found, writes=not machine.rank)
    with files.writing(place.metrics), open(place.metrics, "w", buffering=1, encoding="utf-8") as log:
        measured = fit(ready, machine, log, listen, keeper)
    measured = replace(measured, resumed=int(resuming.known(place.folder).get("resumed", 0)))
    if machine.rank:
        return None
    listen(Stage("scoring beside the baselines"))

    def scored() -> _Draft:
        changed, found = _scored(ready, measured, asked, listen)
        found["experiment"] = digest  # of the recipe as it was given: by it a run that is done is known again
        return _written(changed, found, machine, place)

    return shortage.twice(scored, machine.device, "scoring")  # other processes only wait by now


def _asked(ready: Ready, machine: Machine, listen: Listener) -> _Asked | None:
    """What the untouched base does, where it is a baseline."""
    if machine.rank or not ready.recipe.task.base_is_baseline:
        return None
    listen(Stage("asking the untouched base"))
    contrast = contrasts.prepare(ready.adapted, ready.tokens)
    return _Asked(contrast, contrast.look(ready.adapted, ready.plan, outputs=True))


def _scored(ready: Ready, measured: Measured, asked: _Asked | None, listen: Listener) -> tuple[Ready, dict[str, Any]]:
    """What is ready, with what its task chooses after training, and what report.json holds of it."""
    predicted = {
        name: evaluate.outputs(ready.adapted, tokens, ready.plan)
        for name, tokens in ready.tokens.items()
        if name != "train"
    }
    limits.trim()  # of what training took: the baselines bring libraries of their own
    ready = tuned(ready, predicted)
    found = _reported(ready, measured, predicted, None if asked is None else asked.before.outputs, listen)
    if asked is not None:
        after = asked.contrast.look(ready.adapted, ready.plan, outputs=False)
        found |= asked.contrast.to_json(asked.before, after)
    return ready, found


def _twice(make: Callable[[], T], machine: Machine, what: str) -> T:
    """What `make` gives, made again where memory ran out; once beside other processes, which exchange meanwhile."""
    return make() if machine.processes > 1 else shortage.twice(make, machine.device, what)


def _reported(
    ready: Ready, measured: Measured, predicted: dict[str, Ragged], base: Ragged | None, listen: Listener
) -> dict[str, Any]:
    """What report.json holds, but for what is known once the bundle is written."""
    scores, baselines, untold = _scores(ready, predicted, base)
    task, tokens, train_rows = ready.adapted.task, ready.tokens, ready.rows.train
    told = [exhibits.untold_temperature(task, predicted), ready.adapted.room.found(ready.plan), untold]
    if baselines and len(train_rows) > task.baseline_rows:
        told.append(f"the baselines saw {task.baseline_rows:,} of {len(train_rows):,} training rows")
    told = [text for text in told if text]
    for text in told:
        listen(Note(text))
    notes = [*ready.notes, *told]
    found = report.make(ready.recipe, ready.plan, ready.adapted, measured, scores, baselines, notes, _expected(ready))
    return found | {
        "calibration": exhibits.calibration(task, tokens, predicted),
        "errors": exhibits.errors(task, tokens, predicted),
        "lengths": exhibits.lengths(tokens["train"], task.max_length),
        "rows": exhibits.rows(task, ready.rows, tokens, predicted, ready.recipe.data.report_rows),
    }


def _told(ready: Ready) -> str:
    """What training is expected to take, in words."""
    known = ready.trial or ready.expected
    told = {} if known is None else known.to_json()
    if told.get("seconds") is None or told.get("memory_bytes") is None:
        return ""
    return f": about {show_seconds(told['seconds'])}, and {show_bytes(told['memory_bytes'])} at the peak"


def _expected(ready: Ready) -> dict[str, Any]:
    """What the plan was expected to take, and what was made of that by measuring."""
    found = {} if ready.expected is None else ready.expected.to_json()
    return found | {"probe": None if ready.trial is None else ready.trial.to_json()}


def tuned(ready: Ready, predicted: dict[str, Ragged]) -> Ready:
    """Let the task choose on validation what it chooses after training."""
    if "validation" not in predicted:
        return ready
    task = ready.adapted.task.tune(ready.tokens["validation"].truth, predicted["validation"])
    return replace(
        ready, recipe=ready.recipe.model_copy(update={"task": task}), adapted=replace(ready.adapted, task=task)
    )


def _written(ready: Ready, found: dict[str, Any], machine: Machine, place: Place) -> _Draft:
    """Write the bundle but for what people read, and for what `bundle.seal` writes."""
    adapted, resolved = ready.adapted, ready.recipe
    passport = bundle.passport(adapted, resolved, ready.plan, machine, found["scores"], ready.rows.fingerprint())
    bundle.write(folder := place.draft, adapted, resolved)
    limits.trim()  # of another tokenizer
    found["adapter_bytes"] = bundle.adapter_bytes(folder)
    files.write_json(folder / "report.json", found)
    _require_same_tokens(folder, ready)
    pad = adapted.model.config.pad_token_id
    pad = None if pad == adapted.base.config().get("pad_token_id") else pad
    # Rows of train are not given away: without validation there is no probe.
    held_out = ready.tokens.get("validation")
    probe = None if held_out is None else probes.make_probe(held_out, resolved.data.probe_rows, adapted)
    expected = None if probe is None else probe.logits(adapted)
    return _Draft(Bundle(folder, passport, resolved), found, pad, generation.unknown_ends(adapted), probe, expected)


def _require_same_tokens(folder: Path, ready: Ready) -> None:
    """See that the tokenizer that was written, loaded again, makes the ids that were trained on.

    Raises:
        BundleError: It does not.
    """
    task, train = ready.adapted.task, ready.tokens["train"]
    assert train.rows is not None
    few = list(itertools.islice(train.rows.examples(task), 64))
    again = batches.in_memory(task.encode(load_tokenizer(folder), few))
    if not np.array_equal(again.ids, train.ids[: len(again.ids)]):
        raise BundleError("the tokenizer, saved and loaded again, reads the training rows differently")


def _scores(
    ready: Ready, predicted: dict[str, Ragged], base: Ragged | None
) -> tuple[dict[str, Scores], dict[str, Baseline], str]:
    """Scores of each held-out split, of a published one also without the texts of train, and the baselines' on test.

    At last, in words, why baselines are missing. `base` holds the untouched base's outputs on test, where it is one.
    """
    task, tokens = ready.adapted.task, ready.tokens
    train_rows = ready.rows.train
    scores = {}
    for name, outputs in predicted.items():
        truth, held = tokens[name].truth, tokens[name].rows
        assert held is not None
        scores[name] = evaluate.score(task, truth, outputs)
        apart = data.apart(held, *ready.rows.before(name))
        if 0 < len(apart) < len(truth):
            scores[f"{name}_without_train_texts"] = evaluate.score(task, truth.take(apart), outputs.take(apart))
    if "test" not in tokens:
        return scores, {}, ""
    seed, test = ready.recipe.train.seed, tokens["test"]
    found = {} if base is None else {"base": evaluate.baseline(task, test.truth, predicted["test"], base)}
    try:
        return scores, found | evaluate.baselines(task, train_rows, test, predicted["test"], seed), ""
    except forked.NoRoomError as error:
        return (
            scores,
            found,
            f"the trained baselines were left out: they failed within the memory that was left ({error})",
        )
