"""Charts as SVG that stands inside a page: its colours are the page's, its text is text, and it is always the same.

What the charts say in words is ours alone; texts and labels of users stand in the page's tables.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (4.6, 2.9)  # inches, of 72 units each
# Colours that are drawn with, and what they become in the page.
_INK, _FAINT, _FIRST, _SECOND = "#010203", "#010204", "#010205", "#010206"
_PAGE = {_INK: "currentColor", _FAINT: "var(--line)", _FIRST: "var(--first)", _SECOND: "var(--second)"}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "legend.handletextpad": 0.5,
    "lines.linewidth": 1.8,
    "text.parse_math": False,
}


def loss(points: Sequence[Sequence[float]]) -> str:
    """The loss of the training steps, (step, value) each."""

    def draw(axes: "Axes") -> None:
        axes.plot(*zip(*points, strict=True), color=_FIRST, marker="o" if len(points) == 1 else None)
        _of_steps(axes)
        axes.set_ylabel("training loss")
        axes.set_ylim(bottom=0)

    return _svg("loss", "Training loss by step", draw)


def metric(points: Sequence[Sequence[float]], name: str, best_step: int) -> str:
    """A metric on validation, (step, value) each; the step that was kept is marked."""

    def draw(axes: "Axes") -> None:
        axes.plot(*zip(*points, strict=True), color=_FIRST, marker="o", markersize=4)
        kept = [point for point in points if point[0] == best_step]
        if kept:
            axes.plot(*zip(*kept, strict=True), "o", color=_SECOND, markersize=9, label=f"kept: step {best_step:,}")
            axes.legend(loc="best")
        _of_steps(axes)
        axes.set_ylabel(f"validation {name}")
        axes.margins(y=0.25)

    return _svg("metric", f"Validation {name} by step", draw)


def reliability(before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]] | None) -> str:
    """Shares of right answers by their probability, as the model gives it and, where there is one, with temperature."""

    def draw(axes: "Axes") -> None:
        axes.plot([0, 1], [0, 1], "--", color=_INK, linewidth=0.9)
        named = [("uncalibrated", before, _SECOND, "s")] + ([("calibrated", after, _FIRST, "o")] if after else [])
        for name, bins, color, marker in named:
            x, y = [one["probability"] for one in bins], [one["right"] for one in bins]
            axes.plot(x, y, marker, linestyle="-", linewidth=1, color=color, label=name, markersize=4.5)
        axes.set_xlabel("probability")
        axes.set_ylabel("share that is right")
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        axes.legend(loc="best")

    return _svg("reliability", "Share of right answers by probability", draw)


def lengths(edges: Sequence[int], counts: Sequence[int], most: int) -> str:
    """A histogram, in bins of equal width, of rows by their tokens; `most` is marked where a row comes near it."""

    def draw(axes: "Axes") -> None:
        axes.bar(edges[:-1], counts, width=edges[1] - edges[0], align="edge", color=_FIRST, linewidth=0)
        if edges[-1] > 0.8 * most:
            axes.axvline(most, color=_SECOND, linewidth=1.4, linestyle="--", label=f"max_length {most:,}")
            axes.legend(loc="best")
        axes.set_xlabel("tokens of a row")
        axes.set_ylabel("training rows")

    return _svg("lengths", "Training rows by their tokens", draw)


def _of_steps(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.set_xlabel("step")


def _svg(name: str, title: str, draw: Callable[["Axes"], None]) -> str:
    """Draw a chart and fit it into a page."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({**mpl.rcParamsDefault, **_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return _fitted(written.getvalue(), name, title)


def _fitted(drawn: str, name: str, title: str) -> str:
    """Leave out what is for files (the prolog, metadata, namespaces, names of groups), and take the page's colours."""
    found = drawn[drawn.index("<svg") :]
    found = re.sub(r"<metadata>.*?</metadata>", "", found, flags=re.DOTALL)
    found = re.sub(r'<g id="[^"]*"', "<g", found)
    found = re.sub(r"<style.*?</style>", "", found, flags=re.DOTALL)
    found = re.sub(r"font: [^;\"]*; |font-family: [^;\"]*; ", "", found)
    found = found.replace("xlink:href", "href")
    for color, own in _PAGE.items():
        found = found.replace(color, own)
    box: Any = re.search(r'viewBox="[^"]*"', found)
    inside = found[found.index(">") + 1 :]
    return f'<svg class="chart" role="img" aria-label="{title}" {box.group()} data-chart="{name}">{inside}'.strip()
