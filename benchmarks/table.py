"""Medians, ratios, goals and agreement of a record, and their tables. A record is what `--out` writes."""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.works import GOALS, OURS_BF16, WORKS, Contender, Figure, Goal, Work

Measured = Mapping[str, Any]
"""What a record holds of one work: `prepared`, `limits` by repeat, and `results`."""


@dataclass(frozen=True)
class Form:
    """How a figure is shown."""

    digits: str
    scale: float = 1.0
    unit: str = ""

    def number(self, value: float) -> str:
        """The number, without its unit."""
        return format(value * self.scale, self.digits)


@dataclass(frozen=True)
class Spread:
    """A figure over all repeats."""

    median: float
    low: float
    high: float

    def told(self, form: Form) -> str:
        """Median and range, or the median alone where the range cannot be seen."""
        low, high = form.number(self.low), form.number(self.high)
        spread = "" if low == high else f" [{low}, {high}]"
        return f"{form.number(self.median)}{spread}{form.unit}"


def spread(values: Mapping[int, float]) -> Spread | None:
    """Of values by repeat; None where there are none."""
    found = list(values.values())
    return Spread(statistics.median(found), min(found), max(found)) if found else None


def by_repeat(measured: Measured, name: str, figure: str) -> dict[int, float]:
    """A contender's figure in each repeat."""
    own = (result for result in measured["results"] if result["contender"] == name)
    return {result["repeat"]: result[figure] for result in own if result[figure] is not None}


def ratio(measured: Measured, ours: str, peer: str, figure: str) -> dict[int, float]:
    """Ours over the peer's, repeat by repeat, so that what slows the machine for a while slows both."""
    mine, theirs = (by_repeat(measured, name, figure) for name in (ours, peer))
    return {repeat: mine[repeat] / theirs[repeat] for repeat in mine if repeat in theirs}


def share(measured: Measured, contender: Contender) -> dict[int, float]:
    """Useful FLOPs a second over those of a matrix product in the same repeat."""
    rates = by_repeat(measured, contender.name, "tokens/s")
    limits = {limit["repeat"]: limit[contender.dtype] for limit in measured["limits"]}
    flops = measured["prepared"]["flops_per_token"]
    return {repeat: rate * flops / limits[repeat] for repeat, rate in rates.items() if repeat in limits}


def reached(goal: Goal, measured: Measured) -> Spread | None:
    """What was measured of a goal, against the peer that is hardest to beat."""
    if goal.figure == "share of limit":
        return spread(share(measured, WORKS[goal.work].named(goal.ours)))
    found = [spread(ratio(measured, goal.ours, peer, goal.figure)) for peer in goal.peers]
    known = [one for one in found if one]
    hardest = min if goal.at_least else max
    return hardest(known, key=lambda one: one.median) if known else None


def reference(work: Work, contender: Contender) -> Contender:
    """The one of ours that a contender is compared with: of the same numbers, where there is one."""
    ours = [one for one in work.contenders if one.family == "ours"]
    return next((one for one in ours if one.numbers == contender.numbers), OURS_BF16)


def disagreements(record: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on what must be the same for all contenders of a work, and is not."""
    for name, measured in record["works"].items():
        for contender in WORKS[name].contenders:
            if not contender.full:
                yield from (f"{name}, {contender.name}: {what}" for what in _differs(measured, WORKS[name], contender))


def _differs(measured: Measured, work: Work, contender: Contender) -> Iterator[str]:
    ours = reference(work, contender) if contender.family != "ours" else OURS_BF16
    losses = [spread(by_repeat(measured, one.name, "loss")) for one in (contender, ours)]
    if losses[0] and losses[1] and not abs(losses[0].median - losses[1].median) <= work.tolerance:
        yield (
            f"the loss is {losses[0].median:.3f}, that of {ours.name} {losses[1].median:.3f}; "
            f"they may differ by {work.tolerance}"
        )
    same = {"trainable_parameters": not work.predicts, "all_tokens": not contender.packed}
    for figure in (figure for figure, needed in same.items() if needed):
        found = {*by_repeat(measured, contender.name, figure).values()}
        expected = {*by_repeat(measured, ours.name, figure).values()}
        if found and expected and found != expected:
            yield f"{figure} are {sorted(found)}, of {ours.name} {sorted(expected)}"


def tables(record: Mapping[str, Any]) -> Iterator[Table]:
    """One for each work, and one of the goals."""
    for name, measured in record["works"].items():
        yield _work_table(WORKS[name], measured)
    yield _goal_table(record)


def _work_table(work: Work, measured: Measured) -> Table:
    table = Table(title=f"({work.name}) {work.title}", title_justify="left", caption_justify="left")
    table.caption = _caption(work, measured)
    for column in ("", "tokens/s", "memory", "above imports", "loss", "of limit", "ours: tokens/s", "ours: memory"):
        table.add_column(column, justify="left" if not column else "right")
    for contender in work.contenders:
        if by_repeat(measured, contender.name, "seconds"):
            table.add_row(contender.name, *_cells(work, measured, contender))
    return table


def _caption(work: Work, measured: Measured) -> str:
    facts = measured["prepared"]
    limits = {
        name: spread({limit["repeat"]: limit[name] for limit in measured["limits"]}) for name in ("float32", "bfloat16")
    }
    told = ", ".join(f"{name} {one.told(_FLOPS)}" for name, one in limits.items() if one)
    steps = "" if work.predicts else f"{measured['steps']} timed steps of {work.batch_size}, "
    return f"{steps}{facts['rows']:,} rows of {facts['mean_tokens']:.0f} tokens; products: {told}"


def _cells(work: Work, measured: Measured, contender: Contender) -> Iterator[str]:
    shown = {"tokens/s": _COUNT, "memory": _GIGABYTES, "growth": _GIGABYTES, "loss": _LOSS}
    for figure, form in shown.items():
        found = spread(by_repeat(measured, contender.name, figure))
        yield found.told(form) if found else ""
    found = None if contender.full else spread(share(measured, contender))
    yield found.told(_PERCENT) if found else ""
    for figure in ("tokens/s", "memory"):
        ours = reference(work, contender)
        found = None if contender.family == "ours" else spread(ratio(measured, ours.name, contender.name, figure))
        yield found.told(_TIMES) if found else ""


def _goal_table(record: Mapping[str, Any]) -> Table:
    table = Table(title="Goals", title_justify="left", caption_justify="left")
    table.caption = "the goal is checked on even terms; beside it, the same against the peers as they come"
    for column in ("work", "ours", "against", "what", "goal", "measured", "", "as they come"):
        table.add_column(column)
    for goal in GOALS:
        measured = record["works"].get(goal.work)
        if measured and (found := reached(goal, measured)):
            table.add_row(*_goal_cells(goal, measured, found))
    return table


def _goal_cells(goal: Goal, measured: Measured, found: Spread) -> Iterator[str]:
    form = _PERCENT if goal.figure == "share of limit" else _TIMES
    yield from (goal.work, goal.ours, " or ".join(goal.peers), _FIGURES[goal.figure])
    yield f"{'>=' if goal.at_least else '<='} {form.number(goal.bound)}{form.unit}"
    yield found.told(form)
    yield "met" if goal.met(found.median) else "missed"
    usual = reached(goal.as_they_come, measured) if goal.as_they_come != goal else None
    yield f"{usual.told(form)} {'met' if goal.met(usual.median) else 'missed'}" if usual else ""


_COUNT = Form(",.0f")
_GIGABYTES = Form(".2f", 1e-9, " GB")
_LOSS = Form(".3f")
_PERCENT = Form(".1f", 100, " %")
_TIMES = Form(".2f", 1, "x")
_FLOPS = Form(",.0f", 1e-9, " GFLOP/s")
_FIGURES: Mapping[Figure, str] = {
    "tokens/s": "tokens/s",
    "memory": "peak memory",
    "weights": "bytes of the adapted layers' weights",
    "share of limit": "share of the product's rate",
}
