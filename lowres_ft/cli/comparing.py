"""The command that compares bundles on the same rows."""

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowres_ft.cli.options import Base, Device, Json, Quiet
from lowres_ft.harmless import harmless
from lowres_ft.tasks.base import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from lowres_ft.comparison import Comparison, Contender

_WIDTH = 60  # characters of a text or an answer
_PLAIN = 200  # columns of a table that no terminal shows


def compare(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Two or more.", show_default=False)],
    data: Annotated[
        str | None, typer.Option("--data", help="Rows to compare on.  [default: the first recipe's test rows]")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=0, help="Changed rows that are shown; --json has all.")] = 10,
    base: Base = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare bundles on the same rows."""
    from lowres_ft import device as devices
    from lowres_ft.bundle import open_bundle
    from lowres_ft.cli.display import listening
    from lowres_ft.comparison import compare as compare_bundles
    from lowres_ft.comparison import require_alike

    opened = [open_bundle(folder) for folder in bundles]
    require_alike(opened)
    with tempfile.TemporaryDirectory(prefix="lowres-ft-") as work, listening(quiet) as listen:
        found = compare_bundles(opened, devices.find(device), Path(work), data, base=base, listen=listen)
    if as_json:
        print(json.dumps(found.to_json(), ensure_ascii=False))
        return
    _show(found, rows)


def _show(found: "Comparison", rows: int) -> None:
    """Print the tables."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _PLAIN, highlight=False, markup=False)
    console.print(harmless(f"{found.rows:,} rows ({found.source})"))
    console.print(_bundles(found))
    for place, one in enumerate(found.contenders):
        for sentence in _told(place, one):
            console.print(harmless(sentence))
    for sentence in verdicts(found):
        console.print(harmless(sentence))
    _changes(found, rows, console)


def _bundles(found: "Comparison") -> "Table":
    from rich.table import Table
    from rich.text import Text

    from lowres_ft.verdict import interval

    metrics = list(found.contenders[0].scores.metrics)[:2]
    table = Table()
    for name in ("", "bundle", "method", "base"):
        table.add_column(name, overflow="fold")
    for name in (*metrics, "MB of weights", "rows/s"):
        table.add_column(name, justify="right")
    for place, one in enumerate(found.contenders):
        scores = [interval(one.scores.metrics[name].model_dump()) for name in metrics]
        held = one.dtype if one.quantize == "none" else f"{one.quantize}, {one.dtype}"
        figures = (f"{one.adapter_bytes / 1e6:.3g}", f"{one.rows_per_second:,.0f}")
        table.add_row(_letter(place), Text(printable(one.name)), one.method, held, *scores, *figures)
    return table


def _letter(place: int) -> str:
    """A, B, ..., Z, AA, ..."""
    return (_letter(place // 26 - 1) if place >= 26 else "") + chr(ord("A") + place % 26)


def _told(place: int, one: "Contender") -> list[str]:
    """What is known of the rows that a bundle saw."""
    if one.seen is None:
        return [f"note: which rows {_letter(place)} was trained on is not known: {printable(one.unknown)}"]
    words = {"train": "was trained on", "validation": "chose its best step on"}
    return [
        f"note: {_letter(place)} {words[name]} {count:,} of these rows" for name, count in one.seen.items() if count
    ]


def verdicts(found: "Comparison") -> list[str]:
    """A sentence for each pair: better is only said where it holds."""
    from lowres_ft.verdict import interval

    lines = []
    for pair in found.pairs:
        names = {"first": _letter(pair.first), "second": _letter(pair.second)}
        corrected = f", {pair.p_holm:.3g} after Holm's correction" if len(found.pairs) > 1 else ""
        figures = f"{found.metric} {interval(pair.difference.model_dump(), sign='+')}, p = {pair.p:.3g} ({pair.test})"
        line = f"{names['second']} over {names['first']}: {figures}{corrected}; "
        if pair.better is not None:
            other = names["second" if pair.better == "first" else "first"]
            line += f"{names[pair.better]} is better than {other}"
        elif pair.unseen:
            line += "not clearly different"
        else:
            line += "nothing can be said: one of them saw all of these rows"
        seen = found.rows - pair.difference.count
        lines.append(line + (f" (on the {pair.difference.count:,} rows that neither saw)" if seen else ""))
    return lines


def _changes(found: "Comparison", rows: int, console: "Console") -> None:
    """Print the first of the rows that are not answered alike."""
    from rich.table import Table
    from rich.text import Text

    if not found.changed:
        console.print("every row is answered alike")
        return
    console.print(f"{len(found.changed):,} rows are not answered alike" + (f"; the first {rows}:" if rows else ""))
    if not rows:
        return
    letters = [_letter(place) for place in range(len(found.contenders))]
    table = Table("where", "text", "wanted", *letters, show_lines=False)
    for one in found.changed[:rows]:
        table.add_row(*(Text(_short(text)) for text in (one.where, one.text, one.wanted, *one.answers)))
    console.print(table)


def _short(text: str) -> str:
    line = printable(text)
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 4]} ..."
