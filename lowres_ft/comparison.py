"""Several bundles on the same rows: scores, which differences hold, which answers changed, size and speed."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lowres_ft import bundle as bundles
from lowres_ft import data, evaluate, significance
from lowres_ft.batches import tokenize
from lowres_ft.bundle import Bundle
from lowres_ft.data import Data, Rows
from lowres_ft.device import Machine
from lowres_ft.errors import AssetError, BundleError, DataError
from lowres_ft.evaluate import Scores, Value
from lowres_ft.events import Listener, Stage, unheard
from lowres_ft.prediction import held_out
from lowres_ft.tasks.base import Ragged, Task

_LEVEL = 0.05  # of significance
_WARM = 16  # rows that are answered before time is taken
_LOSSES = 20  # rows of a model that writes, whose losses are shown


@dataclass(frozen=True)
class Contender:
    """One of the bundles that are compared."""

    name: str
    method: str
    quantize: str
    dtype: str
    scores: Scores
    adapter_bytes: int
    rows_per_second: float
    """Of the compared rows, on this machine, now."""
    seen: dict[str, int] | None
    """How many of the rows' texts stand in those that it was trained on, and that its step and thresholds were chosen
    on; None where its data cannot be read as it was."""
    unknown: str = ""
    """Why that is not known."""


@dataclass(frozen=True)
class Pair:
    """Two bundles, by their places, and whether one is better on the task's first metric."""

    first: int
    second: int
    difference: Value
    """How much better the second one is, with a paired interval."""
    test: str
    p: float
    p_holm: float
    """After Holm's correction for all the pairs."""
    better: Literal["first", "second"] | None
    """None where the difference may be chance, or is on rows that one of them saw."""
    unseen: bool
    """True where the difference is on rows that neither saw; else there are none, and it is on all."""


@dataclass(frozen=True)
class Changed:
    """A row that not all bundles answer alike, in words; of models that write, their losses."""

    where: str
    text: str
    wanted: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """What comparing bundles showed."""

    source: str
    rows: int
    metric: str
    higher_is_better: bool
    contenders: tuple[Contender, ...]
    pairs: tuple[Pair, ...]
    changed: tuple[Changed, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it in plain values."""
        contenders = [
            {**{name: value for name, value in vars(one).items() if name != "scores"}, "scores": one.scores.to_json()}
            for one in self.contenders
        ]
        pairs = [asdict(pair) | {"difference": pair.difference.model_dump()} for pair in self.pairs]
        return {
            "source": self.source,
            "rows": self.rows,
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "bundles": contenders,
            "pairs": pairs,
            "changed": [asdict(one) for one in self.changed],
        }


def compare(
    bundles: Sequence[Bundle],
    machine: Machine,
    work: Path,
    source: str | None = None,
    *,
    base: str | None = None,
    listen: Listener = unheard,
) -> Comparison:
    """Score bundles on the rows of a data source, else on the test rows of the first bundle's recipe.

    A bundle is better than another only where the difference is significant at 5 % after Holm's correction (Holm 1979)
    and its interval lies on one side of zero, on rows that neither saw. The test is McNemar's exact one where the first
    metric is the share of right rows, else of paired resamples.

    Raises:
        BundleError: They are not for the same task and labels, or do not answer the same items.
        DataError: The rows cannot be read; see `prediction.held_out`.
    """
    require_alike(bundles)
    first = bundles[0]
    own = _folder(work, "first")
    rows, name = held_out(first, own, source)
    judged = []
    for number, bundle in enumerate(bundles):
        listen(Stage(f"asking {bundle.folder} ({number + 1} of {len(bundles)})"))
        folder = _folder(work, str(number))
        cleaned = rows if number == 0 else _recleaned(rows, first, bundle, source, folder)
        judged.append(_judged(bundle, machine, cleaned, folder, base))
    _require_same_items(bundles, judged)
    pairs = tuple(_pairs(judged))
    task = first.recipe.task
    contenders = tuple(one.contender for one in judged)
    changed = tuple(_changed(judged))
    return Comparison(name, len(judged[0].truth), task.metric, task.higher_is_better, contenders, pairs, changed)


def require_alike(bundles: Sequence[Bundle]) -> None:
    """Refuse bundles that do not answer the same question.

    Raises:
        BundleError: There are fewer than two, or the task, its labels or what it reads differ.
    """
    if len(bundles) < 2:
        raise BundleError("one bundle alone cannot be compared", hint="`lowres-ft evaluate BUNDLE` scores one.")
    first = bundles[0]
    for other in bundles[1:]:
        for what, ours, theirs in _questions(first, other):
            if ours != theirs:
                raise BundleError(
                    f"{first.folder} and {other.folder} cannot be compared: {what} {_told(ours)} and {_told(theirs)}",
                    hint="Compare bundles of one task, with the same labels in the same order.",
                )


def _questions(first: Bundle, other: Bundle) -> Iterator[tuple[str, object, object]]:
    """What must be the same: the name of it, and both values."""
    ours, theirs = first.recipe.task, other.recipe.task
    yield "their tasks are", ours.kind, theirs.kind
    for field in ("multi_label", "pairs"):
        yield f"task.{field} is", getattr(ours, field, None), getattr(theirs, field, None)
    yield "their labels are", ours.names, theirs.names
    if ours.generates:  # its scores are a token's, so the tokens must be the same
        yield "task.template is", getattr(ours, "template", None), getattr(theirs, "template", None)
        yield "task.max_length is", ours.max_length, theirs.max_length
        tokenizers = (first.passport.base.tokenizer_sha256, other.passport.base.tokenizer_sha256)
        yield "their tokenizers are", tokenizers[0][:12], tokenizers[1][:12]


def _told(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


@dataclass(frozen=True)
class _Judged:
    """A bundle's outputs for the rows."""

    contender: Contender
    task: Task
    rows: Rows
    truth: Ragged
    outputs: Ragged
    unseen: np.ndarray
    """Positions of the rows whose texts had no say in the model, as far as is known."""


def _judged(bundle: Bundle, machine: Machine, rows: Rows, folder: Path, base: str | None) -> _Judged:
    """Load a bundle, and score it; its model is freed with this function."""
    found, unknown = _trained_on(bundle, folder)
    place = None if bundle.recipe.method.trains_base else base
    adapted, plan = bundle.load(machine, base=place)
    tokens = tokenize(adapted, rows, folder / "rows")
    assert tokens.rows is not None
    few = tokenize(adapted, rows.take(np.arange(min(_WARM, len(rows)))), folder / "few")
    evaluate.outputs(adapted, few, plan)
    began = time.perf_counter()
    outputs = evaluate.outputs(adapted, tokens, plan)
    seconds = time.perf_counter() - began
    contender = Contender(
        name=str(bundle.folder),
        method=bundle.passport.method,
        quantize=bundle.passport.quantize,
        dtype=plan.dtype,
        scores=evaluate.score(adapted.task, tokens.truth, outputs),
        adapter_bytes=bundles.adapter_bytes(bundle.folder),
        rows_per_second=len(tokens) / max(seconds, 1e-9),
        seen=None if found is None else _seen(found, tokens.rows),
        unknown=unknown,
    )
    unseen = np.arange(len(tokens)) if found is None else data.apart(tokens.rows, *found.before("test"))
    return _Judged(contender, adapted.task, tokens.rows, tokens.truth, outputs, unseen)


def _trained_on(bundle: Bundle, folder: Path) -> tuple[Data | None, str]:
    """The rows that a bundle was made from; None, and why, where they are not there as they were."""
    try:
        found = data.load(bundle.recipe, _folder(folder, "own"))
    except (DataError, AssetError) as error:
        return None, error.message.splitlines()[0]
    held = found.fingerprint()
    if any(held.get(name) != bundle.passport.data.get(name) for name in ("train", "validation")):
        return None, f"the rows of {bundle.recipe.data.train} have changed since training"
    return found, ""


def _seen(found: Data, rows: Rows) -> dict[str, int]:
    """How many rows share a text with each split that had a say in the model."""
    splits = found.splits()
    return {name: len(rows) - len(data.apart(rows, splits[name])) for name in ("train", "validation") if name in splits}


def _recleaned(rows: Rows, first: Bundle, other: Bundle, source: str | None, folder: Path) -> Rows:
    """The rows as another bundle reads them: the same ones, cleaned as its own recipe says."""
    spec = first.recipe.data
    if other.recipe.data.clean == spec.clean:
        return rows
    place = source or (spec.test if isinstance(spec.test, str) else spec.train)
    again, _ = data.store(
        place, first.recipe.task, spec.columns, folder / "again.arrow", cleaners=other.recipe.data.clean
    )
    known = {where: number for number, where in enumerate(again.table["where"].to_pylist())}
    wanted = rows.table["where"].take(rows.index).to_pylist()
    return again.take(np.array([known[where] for where in wanted]))


def _folder(work: Path, name: str) -> Path:
    folder = work / name
    folder.mkdir()
    return folder


def _require_same_items(bundles: Sequence[Bundle], judged: Sequence[_Judged]) -> None:
    """Raise a BundleError where bundles read other items from the same rows."""
    for bundle, one in zip(bundles, judged, strict=True):
        if not all(
            np.array_equal(getattr(one.truth, part), getattr(judged[0].truth, part)) for part in ("starts", "values")
        ):
            raise BundleError(f"{bundles[0].folder} and {bundle.folder} do not answer the same items of these rows")


def _pairs(judged: Sequence[_Judged]) -> Iterator[Pair]:
    """Each two of the bundles; p-values are corrected for their number."""
    places = list(combinations(range(len(judged)), 2))
    found = [_difference(judged[first], judged[second]) for first, second in places]
    corrected = significance.holm([p for *_, p, _ in found])
    for (first, second), (difference, test, p, unseen), holm in zip(places, found, corrected, strict=True):
        better: Literal["first", "second"] | None = None
        if unseen and holm < _LEVEL and not difference.low <= 0 <= difference.high:
            better = "second" if difference.low > 0 else "first"
        yield Pair(first, second, difference, test, p, holm, better, unseen)


def _difference(first: _Judged, second: _Judged) -> tuple[Value, str, float, bool]:
    """How much better the second one is on rows that neither saw; a test, its p-value, and whether there are such rows.

    Where there are none, it is the difference on all rows.
    """
    unseen = np.intersect1d(first.unseen, second.unseen)
    rows = unseen if len(unseen) else np.arange(len(first.truth))
    task = first.task
    evidence = [one.task.evidence(one.truth, one.outputs)[rows] for one in (first, second)]
    gain, samples = evaluate.gains(task, evidence[1], evidence[0])
    if task.metric == "accuracy":
        p = significance.mcnemar(*(_right(one)[rows] for one in (first, second)))
        return gain, "McNemar's exact test", p, len(unseen) > 0
    return gain, "paired bootstrap", significance.bootstrap(samples), len(unseen) > 0


def _right(one: _Judged) -> np.ndarray:
    """(R,) whether each row's only answer is right."""
    found = one.task.certainty(one.truth, one.outputs)
    assert found is not None
    return np.asarray(found[:, 1] == 1)


def _changed(judged: Sequence[_Judged]) -> Iterator[Changed]:
    """The rows that are not answered alike, in words.

    A model that writes is not asked to: of such, those rows whose losses differ most.
    """
    rows = np.arange(len(judged[0].truth))
    if judged[0].task.generates:
        losses = np.stack([one.task.ranking(one.truth, one.outputs)["worst"] for one in judged])
        rows = (losses.min(0) - losses.max(0)).argsort(kind="stable")[:_LOSSES]
    for row, example in zip(rows.tolist(), judged[0].rows.take(rows).examples(judged[0].task), strict=True):
        shown = [one.task.shown(example, one.truth[row], one.outputs[row]) for one in judged]
        answers = tuple(one["found"] for one in shown)
        if len(set(answers)) > 1:
            yield Changed(example.where, shown[0]["text"], shown[0]["wanted"], answers)
