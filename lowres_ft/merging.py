"""Merging an adapter into its base, and proof that nothing changed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch

from lowres_ft import card, evaluate, folders, model, profiles
from lowres_ft.batches import Tokens, tokenize
from lowres_ft.bundle import Bundle
from lowres_ft.device import Machine
from lowres_ft.errors import AssetError, BundleError, DataError, OutputError
from lowres_ft.files import draft, publish, write_bytes, writing
from lowres_ft.model import Adapted
from lowres_ft.plan import Plan
from lowres_ft.prediction import held_out
from lowres_ft.quantize import require_widths
from lowres_ft.tasks.base import Task
from lowres_ft.tokenizing import load_tokenizer

_LARGEST = 1e-3  # of an fp32 logit
_MOST_LOGITS = 2**25  # that are kept of each model: 128 MiB


@dataclass(frozen=True)
class Merged:
    """What a merge was checked on, and what it showed."""

    folder: Path
    rows: int
    """Token sequences whose logits were compared; the metric is that of all rows."""
    source: str
    """Where those rows come from."""
    largest_difference: float
    """Between adapter + fp32 base and the merged model, of a logit."""
    flipped: int
    metric: float | None
    """The task's first metric of the merged model; None where the rows have no labels."""
    from_measured: float | None
    """Largest difference of a logit to the model as it was measured, where that was quantized or in 16 bits."""
    quantized: "Quantized | None" = None
    """What was lost where the merged model was quantized."""
    temperature: float | None = None
    """What other programs must divide logits by for calibrated probabilities: the merged model itself does not."""


@dataclass(frozen=True)
class Quantized:
    """How a merged model in a bitsandbytes format, loaded again, answers beside the one in fp32."""

    form: str
    largest_difference: float
    """Of a logit."""
    flipped: int
    metric: float | None


def merge(
    bundle: Bundle,
    out: Path,
    machine: Machine,
    *,
    base: str | None = None,
    rows: str | None = None,
    quantize: str | None = None,
) -> Merged:
    """Write a plain transformers folder in fp32 that computes what the adapter on its base does.

    It is compared with adapter + full-precision base on `rows` (a data source), else on the recipe's test rows, else on
    the bundle's probe rows. It appears at `out` only if no logit differs by more than 1e-3, no answer flips and the
    metric is not worse. To be in 'int8' or 'nf4', it is quantized after that, and what this changes is told.

    Raises:
        BundleError: The merged model differs, or there is nothing to compare on.
        ModelError: It cannot be quantized so.
        OutputError: `out` exists or cannot be written.
    """
    out = Path(out)
    _require_mergeable(bundle, out, base, quantize)
    with draft(out) as work:
        adapted, plan = bundle.load(machine, dtype="float32", quantize="none", base=base)
        compared = _compared(bundle, adapted, work, rows)
        before = _Answers.of(adapted, plan, compared)
        folder = work / "model"
        with writing(out):
            adapted = _folded(bundle, adapted, plan, folder)
        merged = _proof(bundle, out, compared.source, before, after := _Answers.of(adapted, plan, compared))
        if quantize is not None:
            with writing(out):
                adapted = _quantized(bundle, adapted, folder, quantize)
            merged = replace(merged, quantized=_loss(quantize, after, _Answers.of(adapted, plan, compared), adapted))
        del adapted  # a second model follows
        if (bundle.passport.quantize, bundle.passport.dtype) != ("none", "float32"):
            measured = compared.logits(*bundle.load(machine, base=base))
            merged = replace(merged, from_measured=float(np.abs(before.logits - measured).max()))
        publish(folder if quantize is None else folder / quantize, out)
    return merged


def _require_mergeable(bundle: Bundle, out: Path, base: str | None, quantize: str | None) -> None:
    """Tell before anything is loaded what cannot be merged."""
    if bundle.recipe.method.trains_base:
        raise BundleError(f"{bundle.folder} holds a whole model: there is nothing to merge")
    with writing(out):
        if out.exists():
            raise OutputError(f"{out} exists", hint="Choose another place, or remove it.")
    if quantize is not None:
        require_widths(profiles.profile(bundle.base(base), bundle.recipe.task), quantize)


def _folded(bundle: Bundle, adapted: Adapted, plan: Plan, folder: Path) -> Adapted:
    """Write the merged model, and load what was written."""
    model.merge(adapted)
    folders.save_plain(adapted, folder)
    load_tokenizer(bundle.folder).save_pretrained(folder)
    write_bytes(folder / "README.md", card.render_merged(bundle).encode())
    return replace(adapted, model=folders.load_plain(adapted.task, folder, plan.device), adapted=())


def _quantized(bundle: Bundle, adapted: Adapted, folder: Path, form: str) -> Adapted:
    """Write a merged model again in bitsandbytes' format, and load what was written."""
    small = folders.save_quantized(adapted, folder, form, getattr(torch, bundle.passport.dtype))
    load_tokenizer(bundle.folder).save_pretrained(folder / form)
    write_bytes(folder / form / "README.md", card.render_merged(bundle).encode())
    return replace(adapted, model=small)


@dataclass(frozen=True)
class _Compared:
    """The rows that models are compared on."""

    source: str
    logits: Callable[[Adapted, Plan], np.ndarray]
    metric: Callable[[Adapted, Plan], float] | None = None
    """None where the rows have no labels."""


def _compared(bundle: Bundle, adapted: Adapted, work: Path, rows: str | None) -> _Compared:
    """Rows that were asked for, else the recipe's test rows, else the probe rows."""
    try:
        found, source = held_out(bundle, work, rows)
    except (DataError, AssetError) as error:
        probe = bundle.probe()
        if rows is not None:
            raise
        missing = error.message.splitlines()[0]
        if probe is None:
            told = f"nothing to compare on: no probe rows in {bundle.folder}, and {missing}"
            raise BundleError(told, hint="Give --data.") from error
        return _Compared(f"the bundle's probe rows; {missing}", lambda found, _: probe.logits(found).numpy())
    return _labelled(source, tokenize(adapted, found, work / "rows"))


def _labelled(source: str, tokens: Tokens) -> _Compared:
    def logits(found: Adapted, plan: Plan) -> np.ndarray:
        return evaluate.logits(found, tokens, plan, most=_MOST_LOGITS)

    def metric(found: Adapted, plan: Plan) -> float:
        return evaluate.metric(found.task, tokens.truth, evaluate.outputs(found, tokens, plan))

    return _Compared(source, logits, metric)


@dataclass(frozen=True)
class _Answers:
    """What a model makes of the rows that are compared."""

    logits: np.ndarray
    metric: float | None

    @classmethod
    def of(cls, adapted: Adapted, plan: Plan, compared: _Compared) -> Self:
        metric = None if compared.metric is None else compared.metric(adapted, plan)
        return cls(compared.logits(adapted, plan), metric)


def _flipped(task: Task, before: np.ndarray, after: np.ndarray, gap: float) -> int:
    """How many choices differ.

    Of tokens there are so many that some are tied but for rounding: there, only a lead that the gap cannot turn counts.
    """
    flipped = task.choice(before) != task.choice(after)
    if task.generates or before.ndim > 2:
        second, first = np.moveaxis(np.partition(before, -2, axis=-1)[..., -2:], -1, 0)
        flipped &= first - second > 2 * gap
    return int(flipped.sum())


def _loss(form: str, plain: _Answers, quantized: _Answers, adapted: Adapted) -> Quantized:
    """What quantizing a merged model changed."""
    gap = float(np.abs(plain.logits - quantized.logits).max())
    flipped = int((adapted.task.choice(plain.logits) != adapted.task.choice(quantized.logits)).sum())
    return Quantized(form, gap, flipped, quantized.metric)


def _proof(bundle: Bundle, out: Path, source: str, before: _Answers, after: _Answers) -> Merged:
    """Compare both models' answers; raise a BundleError where they differ."""
    task = bundle.recipe.task
    gap = float(np.abs(before.logits - after.logits).max())
    flipped = _flipped(task, before.logits, after.logits, gap)
    lost = 0.0
    if before.metric is not None and after.metric is not None:
        lost = (before.metric - after.metric) * (1 if task.higher_is_better else -1)
    if not gap <= _LARGEST or flipped or lost > task.metric_noise:
        raise BundleError(
            f"the merged model differs from adapter and base on {len(before.logits)} rows: logits by up to {gap:.2g}, "
            f"{flipped} answers, {task.metric} by {lost:.4f}; nothing was kept",
            hint="Use the adapter unmerged, and report this with the base's name.",
        )
    temperature = getattr(task, "temperature", None)
    return Merged(
        out, len(before.logits), source, gap, flipped, after.metric, from_measured=None, temperature=temperature
    )
