"""The pipeline: from a recipe to a bundle and its report."""

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
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
    report,
    train,
)
from lowres_ft import plan as plans
from lowres_ft.batches import Tokens
from lowres_ft.bundle import Bundle
from lowres_ft.data import Data
from lowres_ft.device import Machine
from lowres_ft.errors import OutputError
from lowres_ft.evaluate import Baseline, Scores
from lowres_ft.events import Evaluated, Fetching, Listener, Note, Stage, Trained, unheard
from lowres_ft.plan import Plan
from lowres_ft.probes import Probe
from lowres_ft.recipe import Recipe
from lowres_ft.report import Measured
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
    with _run_folder(recipe, out, machine) as place:
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
    parameters: int
    steps: int
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
    return Rehearsal(
        rows=sizes,
        labels=tuple(getattr(rows.task, "labels", None) or ()),
        adapted=len(chosen),
        trainable_parameters=profiles.trainable(recipe.method, profile),
        parameters=profile.parameters,
        steps=train.total_steps(recipe.train, sizes["train"]),
        plan=plans.make(recipe, profile, machine),
    )


@dataclass(frozen=True)
class _Place:
    """Where a run writes. Processes other than the first write to a folder of their own, which goes afterwards."""

    out: Path
    folder: Path

    @property
    def work(self) -> Path:
        """Rows and tokens, gone after the run."""
        return self.folder / "work"

    @property
    def draft(self) -> Path:
        """The bundle while it is written."""
        return self.folder / "bundle"


@contextmanager
def _run_folder(recipe: Recipe, out: str | Path | None, machine: Machine) -> Iterator[_Place]:
    """`<out>.run`, locked; it goes when the bundle stands, or when the run fails before it has trained a step."""
    if machine.rank:
        with tempfile.TemporaryDirectory(prefix="lowres-ft-") as folder:
            place = _Place(Path(device.same_for_all(machine, "")), Path(folder))
            place.work.mkdir()
            yield place
        return
    place, lock = _claim(recipe, out)
    device.same_for_all(machine, str(place.out))
    kept = False
    try:
        yield place
    except BaseException as stopped:
        kept = _has_steps(place)
        what = f"{place.folder} keeps plan.json and metrics.jsonl" if kept else "nothing was kept"
        stopped.add_note(f"no bundle was written; {what}")
        raise
    finally:
        lock.release()
        shutil.rmtree(place.work, ignore_errors=True)
        shutil.rmtree(place.draft, ignore_errors=True)
        if not kept:
            shutil.rmtree(place.folder, ignore_errors=True)


def _has_steps(place: _Place) -> bool:
    path = place.folder / "metrics.jsonl"
    return path.is_file() and path.stat().st_size > 0


def _claim(recipe: Recipe, out: str | Path | None) -> tuple[_Place, FileLock]:
    """Lock the run folder of `out`, or of the first free default name.

    Raises:
        OutputError: `out` exists, another run is writing there, or it cannot be written.
    """
    first = Path(out) if out is not None else Path("runs") / recipe.name
    for number in itertools.count(1):
        place = first if number == 1 else first.with_name(f"{first.name}-{number}")
        if place.exists() and out is None:
            continue
        if place.exists():
            raise OutputError(f"{place} exists", hint="Choose another place with --out, or remove it.")
        folder = place.with_name(f"{place.name}.run")
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / "lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if out is None:
                    continue
                raise OutputError(
                    f"another run is writing to {folder}", hint="Wait, or choose another --out."
                ) from None
            for leftover in folder.iterdir():  # of a run that was killed
                if leftover.name != "lock":
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            found = _Place(place, folder)
            found.work.mkdir()
            found.draft.mkdir()
            return found, lock
    raise AssertionError("there is always a next number")


@dataclass(frozen=True)
class _Draft:
    """A bundle that is written but for its probe and passport, and what its model computed."""

    bundle: Bundle
    probe: Probe | None
    expected: Tensor | None


def _experiment(resolved: Recipe, rows: Data, machine: Machine, place: _Place, listen: Listener) -> _Draft | None:
    """Train, score and write. The model is freed with this function, so that the reloaded one has its room."""
    base = bases.resolve(resolved.model, _progress(listen))
    profile = profiles.profile(base, resolved.task)
    profiles.targets(resolved.method, profile.linears)  # a wrong name is told before any weight is read
    plan = plans.make(resolved, profile, machine)
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
    found = report.make(resolved, plan, adapted, measured, scores, baselines, rows.notes)
    passport = bundle.passport(adapted, resolved, plan, machine, found["scores"], rows.fingerprint())
    draft = Bundle(place.draft, passport, resolved)
    bundle.write(draft.folder, adapted, resolved)
    found["adapter_bytes"] = report.adapter_bytes(draft.folder)
    files.write_json(draft.folder / "report.json", found)
    pad = adapted.model.config.pad_token_id if base.config().get("pad_token_id") is None else None
    files.write_bytes(draft.folder / "README.md", card.render(draft, found, pad_token_id=pad).encode())
    probe = probes.make_probe(tokens.get("validation", tokens["train"]), resolved.data.probe_rows, adapted)
    return _Draft(draft, probe, None if probe is None else probe.outputs(adapted))


def _fit(
    state: TrainState, tokens: dict[str, Tokens], plan: Plan, machine: Machine, place: _Place, listen: Listener
) -> Measured:
    """Train to the end, evaluating as the recipe says, and leave the best step's tensors in the model."""
    spec, task = state.spec, state.adapted.task
    every = spec.evaluate_every or batches.steps_per_epoch(len(tokens["train"]), spec.batch_size)
    steps: list[Step] = []
    with open(place.folder / "metrics.jsonl", "w", buffering=1, encoding="utf-8") as log:
        for step in train.train(state, tokens["train"], plan, machine):
            steps.append(step)
            log.write(json.dumps(asdict(step)) + "\n")
            listen(Trained(step, state.total))
            if "validation" in tokens and (step.number % every == 0 or step.number == state.total):
                predicted = evaluate.outputs(state.adapted, tokens["validation"], plan)
                value = task.metrics(evaluate.targets(tokens["validation"]), predicted)[task.metric]
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
