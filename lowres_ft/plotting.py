"""A learning curve drawn, as SVG and PNG."""

import io
from pathlib import Path

import numpy as np

from lowres_ft import files
from lowres_ft.curve import Curve

_SHARE = 1.05  # how far beyond twice the largest size the drawing goes


def draw(curve: Curve, folder: Path, title: str) -> None:
    """Write `curve.svg` and `curve.png`: runs, the fitted law with its interval, and the hidden size's prediction.

    Raises:
        OutputError: They cannot be written.
    """
    # Figures by themselves: matplotlib's pyplot would look for a screen, and keep every figure.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    sizes = np.geomspace(curve.points[0].size, _SHARE * 2 * curve.largest, 100)
    means, runs = [curve.law.curve(size) for size in sizes], [curve.law.runs(size) for size in sizes]
    axes.fill_between(sizes, [one.low for one in runs], [one.high for one in runs], alpha=0.15, label="a run, 95 %")
    axes.fill_between(sizes, [one.low for one in means], [one.high for one in means], alpha=0.3, label="mean, 95 %")
    axes.plot(sizes, [one.value for one in means], label="a - b n$^{-c}$")
    axes.scatter(
        [score.size for score in curve.scores],
        [score.value for score in curve.scores],
        s=14,
        color="black",
        label="runs",
    )
    hidden = curve.hidden.predicted
    ends = [[hidden.value - hidden.low], [hidden.high - hidden.value]]
    axes.errorbar(
        [curve.hidden.size * 1.03], [hidden.value], yerr=ends, fmt="s", capsize=3, label="predicted from the smaller"
    )
    axes.set_xscale("log")
    axes.set_xticks([*dict.fromkeys([point.size for point in curve.points] + [2 * curve.largest])])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="training rows", ylabel=f"{curve.metric} on test", title=title)
    axes.legend(frameon=False)
    for ending in ("svg", "png"):
        drawn = io.BytesIO()
        # Without a date, so that the same curve is the same file.
        figure.savefig(drawn, format=ending, dpi=150, metadata={"Date": None} if ending == "svg" else None)
        files.write_bytes(folder / f"curve.{ending}", drawn.getvalue())
