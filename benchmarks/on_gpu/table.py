"""A record of `benchmarks/gpu.py` as plain tables."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.on_gpu.cells import GOAL_CAP, PASSING_CAP

Found = Mapping[str, Any]
"""What a record holds of a cell: its shape, numbers, length and cap, and its figures."""

_GIB = 2**30
_GOAL = ("llama-3.1-8b", "int8", 2048)
_AGREES = 0.02  # of a loss, by how much first losses may differ: they are of one model, before anything is learned


def lines(record: Mapping[str, Any]) -> Iterator[str]:
    """All tables of a record, and what is wrong with it."""
    found = list(record["cells"].values())
    trained = [one for one in found if "error" not in one and "products" not in one]
    if whole := [one for one in trained if one["cap"] is None]:
        yield from _titled("All of the GPU", _rows(whole, whole))
    for cap in sorted({one["cap"] for one in trained if one["cap"] is not None}, reverse=True):
        yield from _titled(f"In {cap:g} GiB, CUDA's own included", _fits(one for one in trained if one["cap"] == cap))
    for one in found:
        if "products" in one:
            yield from _titled(f"Products of int8 weights, {one['shape']}", _products(one["products"]))
    if not record["tiny"]:
        yield from _titled("Goals", _goals(trained))
    yield from (f"error: {one}" for one in wrong(record))


def wrong(record: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on cells that failed, and on first losses and parameters that should be the same and are not."""
    for key, one in record["cells"].items():
        if "error" in one:
            yield f"{key}: {one['error'].splitlines()[-1]}"
    whole = [one for one in record["cells"].values() if one.get("first_loss") is not None and one["cap"] is None]
    for one in whole:
        for other in _peers(one, whole):
            named = f"{one['shape']} {one['numbers']} {one['length']}: {one['way']} and {other['way']}"
            if abs(one["first_loss"] - other["first_loss"]) > _AGREES * other["first_loss"]:
                yield f"{named} begin with losses of {one['first_loss']:.4f} and {other['first_loss']:.4f}"
            if one["trainable_parameters"] != other["trainable_parameters"]:
                yield f"{named} train {one['trainable_parameters']:,} and {other['trainable_parameters']:,} parameters"


def _same(one: Found, other: Found) -> bool:
    """Whether two are of the same work."""
    return all(one[name] == other[name] for name in ("shape", "numbers", "length"))


def _peers(one: Found, among: Iterable[Found]) -> list[Found]:
    """Trainer's, of the same work as one of ours."""
    if not one["way"].startswith("ours"):
        return []
    return [other for other in among if _same(one, other) and other["way"].startswith("trainer") and other["fits"]]


def _rows(shown: Iterable[Found], among: Sequence[Found]) -> Iterator[Sequence[str]]:
    yield ("shape", "numbers", "length", "way", "tokens/s", "memory", "card", "loss", "x trainer: tokens/s", "memory")
    for one in shown:
        named = (one["shape"], one["numbers"], str(one["length"]), one["way"])
        if not one["fits"]:
            yield (*named, "OOM", one.get("at", ""))
            continue
        peer = next((other for other in _peers(one, among) if other["way"] == "trainer"), None)
        yield (*named, *_figures(one), *(_ratios(one, peer) if peer else ()))


def _figures(one: Found) -> tuple[str, ...]:
    card, losses = one.get("card"), (one["first_loss"], one["loss"])
    return (
        f"{one['tokens/s']:,.0f}",
        _gib(one["memory"]),
        _gib(card) if card else "",
        "" if None in losses else " -> ".join(f"{loss:.3f}" for loss in losses),
    )


def _ratios(one: Found, peer: Found) -> tuple[str, str]:
    return f"{one['tokens/s'] / peer['tokens/s']:.2f}", f"{one['memory'] / peer['memory']:.2f}"


def _gib(value: int) -> str:
    return f"{value / _GIB:.2f} GiB"


def _fits(shown: Iterable[Found]) -> Iterator[Sequence[str]]:
    yield ("shape", "numbers", "length", "what fits", "tokens/s", "memory", "card", "loss")
    for one in shown:
        named = (one["shape"], one["numbers"], str(one["length"]))
        yield (*named, one["way"], *_figures(one)) if one["fits"] else (*named, f"{one['way'].split()[0]}: OOM")


def _products(found: Iterable[Found]) -> Iterator[Sequence[str]]:
    yield ("rows", "outputs", "inputs", "kernel", *("ms", "TFLOP/s", "error") * 2)
    for one in found:
        sizes = (str(one[name]) for name in ("rows", "outputs", "inputs"))
        cells = []
        for way in ("forward", "backward"):
            milliseconds, rate, error = (one[f"{way}_{name}"] for name in ("ms", "tflops", "error"))
            cells += [f"{milliseconds:.3f}", f"{rate:.1f}", f"{error:.1e}"]
        yield (*sizes, one["kernel"], *cells)


def _goals(trained: Sequence[Found]) -> Iterator[Sequence[str]]:
    """One way of ours must be twice as fast as one of Trainer's and take 0.6 times its memory; and one must fit."""
    yield ("llama-3.1-8b, int8, 2048 tokens", "against", "tokens/s >= 2 x", "memory <= 0.6 x", "")
    work = [one for one in trained if (one["shape"], one["numbers"], one["length"]) == _GOAL]
    whole = [one for one in work if one["cap"] is None and one["fits"]]
    for one in whole:
        for peer in _peers(one, whole):
            speed, memory = _ratios(one, peer)
            met = one["tokens/s"] >= 2 * peer["tokens/s"] and one["memory"] <= 0.6 * peer["memory"]
            yield (one["way"], peer["way"], speed, memory, "met" if met else "missed")
    for one in trained:
        if one["cap"] == PASSING_CAP and "passing" in one["way"]:
            explained = f"copies {one['copying_seconds'] / median(one['seconds']):.0%}" if one["fits"] else ""
            named = f"{one['way']}, {one['numbers']}, {one['length']} tokens"
            yield (named, f"{PASSING_CAP:g} GiB", "", explained, "met" if one["fits"] else "missed")
    for one in work:
        if one["cap"] == GOAL_CAP and one["way"].startswith("ours"):
            yield (one["way"], f"{GOAL_CAP:g} GiB", "", "", "met" if one["fits"] else "missed")


def _titled(title: str, rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Left-aligned columns; nothing where there are no rows below the names of the columns."""
    listed = list(rows)
    if len(listed) < 2:
        return
    width = max(map(len, listed))
    padded = [[*row, *[""] * (width - len(row))] for row in listed]
    widths = [max(len(row[at]) for row in padded) for at in range(width)]
    yield title
    for row in padded:
        yield "  " + "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip()
    yield ""
