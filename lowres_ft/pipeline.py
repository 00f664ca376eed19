"""The pipeline: from a recipe to a bundle and its report."""

import itertools
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from lowres_ft import (
    assets,
    bases,
    batches,
    bundle,
    card,
    data,
    device,
    evaluate,
    files,
    model,
    probes,
    profiles,
    quantize,
    report,
    train,
)
from lowres_ft import plan as plans
from lowres_ft.batches import Tokens
from lowres_ft.bundle import Bundle
from lowres_ft.data import Data
from lowres_ft.device import Machine
from lowres_ft.errors import BundleError
from lowres_ft.evaluate import Baseline, Scores
from lowres_ft.events import Evaluated, Fetching, Listener, Note, Stage, Trained, unheard
from lowres_ft.model import Adapted
from lowres_ft.plan import Plan
from lowres_ft.probes import Probe
from lowres_ft.profiles import Profile
from lowres_ft.recipe import Recipe
from lowres_ft.report import Measured
from lowres_ft.runs import Place, run_folder
from lowres_ft.train import Step, TrainState


def run(
    recipe: Recipe, out: str | Path | None = None, *, device_name: str = "auto", listen: Listener = unheard
) -> Bundle:
    """Train, evaluate and bundle a recipe; return the bundle, which stands at `out` (default `runs/<name>`).

    Started by accelerate's launcher, all processes share each step and the first one writes.

    Raises:
        LowresError: Something that the user can mend; its kind says what.
    """
    for text in recipe.notes:
        listen(Note(text))
    machine = device.find(device_name)
    if machine.rank:
        listen = unheard
    with run_folder(recipe.name, out, machine) as place:
        listen(Stage(f"reading {recipe.data.train}"))
        rows = data.load(recipe, place.work, _progress(listen))
        for text in rows.notes:
            listen(Note(text))
        resolved = recipe.model_copy(update={"task": rows.task})
        draft = _experiment(resolved, rows, machine, place, listen)
        if draft is not None:
            listen(Stage("loading what was written, and comparing"))
            bundle.seal(draft.bundle, machine, draft.probe, draft.expected)
            files.publish(place.draft, place.out)
    device.wait_for_all(machine)
    return bundle.open_bundle(place.out)


@dataclass(frozen=True)
class Rehearsal:
    """What a run would do, as far as can be told without loading weights."""

    rows: dict[str, int]
    """Rows of each split."""
    labels: tuple[str, ...]
    adapted: int
    """Linear layers that are adapted."""
    trainable_parameters: int
    steps: int
    profile: Profile
    plan: Plan


def rehearse(recipe: Recipe, *, device_name: str = "auto", listen: Listener = unheard) -> Rehearsal:
    """Read the data and look at the base, but load and train nothing.

    Raises:
        LowresError: What `run` would raise before its first step.
    """
    machine = device.find(device_name)
    with tempfile.TemporaryDirectory(prefix="lowres-ft-") as folder:
        rows = data.load(recipe, Path(folder), _progress(listen))
        sizes = {name: len(split) for name, split in rows.splits().items()}
        profile = profiles.profile(bases.resolve(recipe.model, _progress(listen)), rows.task)
    chosen = profiles.targets(recipe.method, profile.linears)
    profiles.require_length(profile, recipe.task)
    quantize.require_widths(profile, recipe.model.quantize)
    return Rehearsal(
        rows=sizes,
        labels=tuple(getattr(rows.task, "labels", None) or ()),
        adapted=len(chosen),
        trainable_parameters=profiles.trainable(recipe.method, profile),
        profile=profile,
        steps=train.total_steps(recipe.train, sizes["train"]),
        plan=plans.make(recipe, profile, machine),
    )


@dataclass(frozen=True)
class _Draft:
    """A bundle that is written but for its probe and passport, and what its model computed."""

    bundle: Bundle
    probe: Probe | None
    expected: Tensor | None


def _experiment(resolved: Recipe, rows: Data, machine: Machine, place: Place, listen: Listener) -> _Draft | None:
    """Train, score and write. The model is freed with this function, so that the reloaded one has its room."""
    base = bases.resolve(resolved.model, _progress(listen))
    profile = profiles.profile(base, resolved.task)
    profiles.targets(resolved.method, profile.linears)  # a wrong name is told before any weight is read
    profiles.require_length(profile, resolved.task)
    quantize.require_widths(profile, resolved.model.quantize)
    plan = plans.make(resolved, profile, machine)
    if plan.pinned_cut:
        listen(Note("dropout inside the base ties the result to this machine's cut of a step (model.dropout)"))
    files.write_json(place.folder / "plan.json", plan.model_dump(mode="json"))
    listen(Stage(f"loading {resolved.model.base} on {machine.name} in {plan.dtype}"))
    adapted = model.load(resolved, base, profile, plan)
    listen(Stage("tokenizing"))
    tokens = {name: batches.tokenize(adapted, split, place.work / name) for name, split in rows.splits().items()}
    state = train.start(resolved, adapted, tokens["train"], plan)
    listen(Stage(f"training on {len(rows.train):,} rows"))
    measured = _fit(state, tokens, plan, machine, place, listen)
    if machine.rank:
        return None
    listen(Stage("scoring beside the baselines"))
    predicted = {name: evaluate.outputs(adapted, tokens[name], plan) for name in tokens if name != "train"}
    scores, baselines = _scores(resolved, rows, tokens, predicted)
    notes = list(rows.notes)
    if baselines and len(rows.train) > rows.task.baseline_rows:
        notes.append(f"the baselines saw {rows.task.baseline_rows:,} of {len(rows.train):,} training rows")
        listen(Note(notes[-1]))
    found = report.make(resolved, plan, adapted, measured, scores, baselines, notes)
    passport = bundle.passport(adapted, resolved, plan, machine, found["scores"], rows.fingerprint())
    draft = Bundle(place.draft, passport, resolved)
    bundle.write(draft.folder, adapted, resolved)
    found["adapter_bytes"] = report.adapter_bytes(draft.folder)
    files.write_json(draft.folder / "report.json", found)
    pad = adapted.model.config.pad_token_id
    pad = None if pad == base.config().get("pad_token_id") else pad
    files.write_bytes(draft.folder / "README.md", card.render(draft, found, pad_token_id=pad).encode())
    _require_same_tokens(draft.folder, rows, tokens, adapted)
    # Rows of train are not given away: without validation there is no probe.
    held_out = tokens.get("validation")
    probe = None if held_out is None else probes.make_probe(held_out, resolved.data.probe_rows, adapted)
    return _Draft(draft, probe, None if probe is None else probe.outputs(adapted))


def _require_same_tokens(folder: Path, rows: Data, tokens: dict[str, Tokens], adapted: Adapted) -> None:
    """See that the tokenizer that was written, loaded again, makes the ids that were trained on.

    Raises:
        BundleError: It does not.
    """
    written = model.load_tokenizer(folder)
    few = list(itertools.islice(rows.train.examples(rows.task), 64))
    for position, encoded in enumerate(adapted.task.encode(written, few)):
        if encoded.ids != tokens["train"].sequence(position).tolist():
            raise BundleError(f"the tokenizer, saved and loaded again, reads {few[position].where} differently")


def _fit(
    state: TrainState, tokens: dict[str, Tokens], plan: Plan, machine: Machine, place: Place, listen: Listener
) -> Measured:
    """Train to the end, evaluating as the recipe says, and leave the best step's tensors in the model."""
    spec, task = state.spec, state.adapted.task
    every = spec.evaluate_every or batches.steps_per_epoch(len(tokens["train"]), spec.batch_size)
    steps: list[Step] = []
    with files.writing(place.metrics), open(place.metrics, "w", buffering=1, encoding="utf-8") as log:
        for step in train.train(state, tokens["train"], plan, machine):
            steps.append(step)
            log.write(json.dumps(asdict(step)) + "\n")
            listen(Trained(step, state.total))
            if "validation" in tokens and (step.number % every == 0 or step.number == state.total):
                predicted = evaluate.outputs(state.adapted, tokens["validation"], plan)
                value = evaluate.metric(task, evaluate.targets(tokens["validation"]), predicted)
                value = float(device.same_for_all(machine, repr(value)))  # all processes stop at the same step
                state.record(value)
                log.write(json.dumps({"number": step.number, task.metric: value}) + "\n")
                listen(Evaluated(step.number, task.metric, value))
    state.restore_best()
    return Measured(
        train_seconds=sum(step.seconds for step in steps),
        examples=sum(step.examples for step in steps),
        tokens=sum(step.tokens for step in steps),
        steps=len(steps),
        best_step=state.best_step or len(steps),
        peak_bytes=device.peak_bytes(plan.device),
    )


def _scores(
    resolved: Recipe, rows: Data, tokens: dict[str, Tokens], predicted: dict[str, np.ndarray]
) -> tuple[dict[str, Scores], dict[str, Baseline]]:
    """Scores of each held-out split, of a published one also without the texts of train, and the baselines' on test."""
    task = resolved.task
    scores = {}
    for name, outputs in predicted.items():
        truth = evaluate.targets(tokens[name])
        scores[name] = evaluate.score(task, truth, outputs)
        apart = rows.apart(name)
        if 0 < len(apart) < len(truth):
            scores[f"{name}_without_train_texts"] = evaluate.score(task, truth[apart], outputs[apart])
    if rows.test is None:
        return scores, {}
    truth = evaluate.targets(tokens["test"])
    return scores, evaluate.baselines(task, rows.train, rows.test, truth, predicted["test"], resolved.train.seed)


def _progress(listen: Listener) -> assets.Progress:
    return lambda what, done, total: listen(Fetching(what, done, total))
