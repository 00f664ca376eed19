"""report.html: report.json as one page, which needs no network and shows texts as texts, whatever they hold."""

import unicodedata
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from lowres_ft import verdict, yaml12
from lowres_ft.page import charts

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup

_LABEL = 60  # characters of a label that are shown
_TEXT = 400  # of a text
_ANSWER = 200  # of an answer, or of the place of a row
_NOTES = 50
_RECIPE = 20_000
_MOST_CELLS = 20  # classes whose confusion is shown as a table
_MOST_CONFUSED = 10  # pairs of classes that are listed
_MOST_ROWS = 300  # of a table of classes
_SAMPLES = 20


def render(report: Mapping[str, Any]) -> str:
    """The page of what report.json holds: the same bytes for the same report."""
    sentence, outcome = verdict.sentence(report)
    return _template().render(
        report=report,
        recipe=report["recipe"],
        sentence=sentence,
        outcome=outcome,
        scores=_scores(report),
        charts=_charts(report),
        confusion=_confusion(report),
        parts=_parts(report),
        errors=report["errors"].get(_split(report), {}),
        planned=_planned(report),
        ranks=_ranks(report),
        samples=report.get("samples", [])[:_SAMPLES],
        recipe_text=yaml12.dumps(report["recipe"]),
        most={
            "label": _LABEL,
            "text": _TEXT,
            "answer": _ANSWER,
            "notes": _NOTES,
            "recipe": _RECIPE,
            "rows": _MOST_ROWS,
        },
    )


def visible(text: object, most: int = _TEXT) -> str:
    """A text in which nothing acts: marks that are not printed stand as their escapes; about `most` characters of it.

    Those are control characters, marks that turn the direction of writing, and others without a width.
    """
    whole = str(text)
    shown: list[str] = []
    size = 0
    for mark in whole:
        if size >= most:
            return f"{''.join(shown)} ... ({len(whole):,} characters)"
        shown.append(_visible(mark))
        size += len(shown[-1])
    return "".join(shown)


def _visible(mark: str) -> str:
    if mark.isprintable():
        return mark
    if unicodedata.category(mark) == "Zs":
        return " "
    return {"\n": "\u23ce ", "\t": "\u21e5 "}.get(mark) or mark.encode("unicode_escape").decode("ascii")


@cache
def _template() -> "Template":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lowres_ft", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"visible": visible, "interval": verdict.interval, "compared": verdict.compared}
    return environment.get_template("report.html.j2")


def _split(report: Mapping[str, Any]) -> str | None:
    """The split that is shown in detail."""
    return next((name for name in ("test", "validation") if name in report["scores"]), None)


def _of_split(report: Mapping[str, Any]) -> Mapping[str, Any]:
    name = _split(report)
    found: Mapping[str, Any] = {} if name is None else report["scores"][name]
    return found


def _scores(report: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics, and rows of a table: splits, then baselines, each with its gain."""
    rows = [(name.replace("_", " "), scores) for name, scores in report["scores"].items()]
    rows += [(f"baseline: {verdict.baseline_name(name)}", scores) for name, scores in report["baselines"].items()]
    return {"metrics": verdict.metrics(rows[0][1]) if rows else [], "rows": rows}


def _charts(report: Mapping[str, Any]) -> "dict[str, Markup]":
    from markupsafe import Markup

    curves, lengths = report["curves"], report["lengths"]
    found = {"loss": charts.loss(curves["loss"]), "metric": "", "reliability": ""}
    if len(curves["validation"]) > 1:
        (first, *_) = verdict.metrics(report["scores"]["validation"])
        found["metric"] = charts.metric(curves["validation"], first.replace("_", " "), report["measured"]["best_step"])
    found["lengths"] = charts.lengths(lengths["edges"], lengths["counts"], lengths["max_length"])
    split = report["calibration"].get(_split(report))
    if split:
        scaled = split["after"]["bins"] if report["calibration"]["temperature"] else None
        found["reliability"] = charts.reliability(split["before"]["bins"], scaled)
    return {name: Markup(svg) for name, svg in found.items()}  # noqa: S704, it holds nothing of a user's


def _confusion(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Shares of each true class as a table, where it is small enough, and the pairs that are confused most."""
    scores = _of_split(report)
    if "confusion" not in scores:
        return None
    labels, counts = list(scores["classes"]), scores["confusion"]
    pairs = [
        (count, labels[true], labels[found])
        for true, row in enumerate(counts)
        for found, count in enumerate(row)
        if count and true != found
    ]
    table = [(label, [(n, n / max(1, sum(row))) for n in row]) for label, row in zip(labels, counts, strict=True)]
    return {
        "labels": labels,
        "table": table if len(labels) <= _MOST_CELLS else None,
        "pairs": sorted(pairs, key=lambda pair: -pair[0])[:_MOST_CONFUSED] if len(labels) > 2 else [],
    }


def _parts(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Scores by class or by type of entity."""
    scores = _of_split(report)
    name = next((name for name in ("classes", "types") if scores.get(name)), None)
    if name is None:
        return None
    columns = list(next(iter(scores[name].values())))
    return {"name": {"classes": "class", "types": "type"}[name], "columns": columns, "rows": scores[name]}


def _planned(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What was planned beside what was measured, in words."""
    return list(_rows(report["plan"], report["measured"], report))


def _rows(plan: Mapping[str, Any], measured: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[Any]:
    def gigabytes(count: float | None) -> str:
        return "" if count is None else f"{count / 1e9:.2f} GB"

    seconds = plan.get("seconds")
    yield "peak memory", gigabytes(plan.get("memory_bytes")), gigabytes(measured["peak_bytes"])
    yield "training", "" if seconds is None else f"{seconds:,.1f} s", f"{measured['train_seconds']:,.1f} s"
    yield "speed", "", f"{measured['tokens_per_second']:,.0f} tokens/s, {measured['examples_per_second']:,.1f} rows/s"
    yield "steps", "", f"{measured['steps']:,}, the best {measured['best_step']:,}"
    share = report["trainable_parameters"] / max(1, report["parameters"])
    yield "trained parameters", "", f"{report['trainable_parameters']:,} ({share:.2%})"
    yield "weights of the bundle", "", f"{report['adapter_bytes'] / 1e6:.1f} MB"
    many = f", {plan['processes']} processes" * (plan["processes"] > 1)
    yield "device", f"{plan['device']}, {plan['threads']} thread{'s' * (plan['threads'] > 1)}{many}", ""
    yield "computes in", plan["dtype"], ""
    yield "tokens at once", f"{plan['micro_batch_tokens']:,}", ""
    yield "attention, recomputed", f"{plan['attention']}, {plan['recompute']}", ""


_RANKS = {"worst": "Answered worst", "uncertain": "Most in doubt"}


def _ranks(report: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(_RANKS[name], report["rows"][name]) for name in _RANKS if report["rows"].get(name)]
