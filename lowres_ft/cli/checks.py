"""Commands about data: check and curve."""

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowres_ft.cli.options import Device, Json, Overrides, Quiet
from lowres_ft.cli.recipes import Name

if TYPE_CHECKING:
    from lowres_ft.checking import Checked
    from lowres_ft.curve import Curve

_ROWS = 5  # rows of a finding that are printed


def check(name: Name, overrides: Overrides = None, quiet: Quiet = False, as_json: Json = False) -> None:
    """Check the data of a recipe, before any weight is loaded."""
    from lowres_ft.recipe import load_recipe

    loaded = load_recipe(name, overrides or [])
    from lowres_ft import checking
    from lowres_ft.cli.display import listening

    with listening(quiet) as listen:
        found = checking.check(loaded, listen=listen)
    if as_json:
        print(json.dumps({"recipe": loaded.name, **found.to_json()}, ensure_ascii=False))
    else:
        _print(found)
    if found.wrong:
        raise typer.Exit(2)


def _print(found: "Checked") -> None:
    from lowres_ft import checking

    rows = ", ".join(f"{count:,} {name}" for name, count in found.rows.items())
    print(f"{rows} rows" + (f"; labels {', '.join(found.labels)}" if found.labels else ""))
    for note in found.notes:
        print(f"note: {note}")
    for finding in found.findings:
        print(f"{finding.severity}: {checking.line(finding)}")
        if finding.rows:
            more = f" and {finding.count - _ROWS:,} more" if finding.count > _ROWS else ""
            print(f"  {', '.join(finding.rows[:_ROWS])}{more}")
        print(f"  {finding.hint}")
    for kind, looked in found.samples.items():
        print(f"sample: {kind} looked at {', '.join(f'{count:,} rows of {name}' for name, count in looked.items())}")
    counts = [sum(one.severity == name for one in found.findings) for name in ("error", "warning", "info")]
    print(f"{counts[0]} errors, {counts[1]} warnings, {counts[2]} infos")


def curve(
    name: Name,
    overrides: Overrides = None,
    sizes: Annotated[
        str | None,
        typer.Option("--sizes", help="Training rows, such as 500,1000,2000,4000.  [default: five, up to all rows]"),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs at each size.")] = 3,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the results.  [default: curves/NAME]")] = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train at several sizes, and tell what more rows would bring."""
    from lowres_ft import least, limits
    from lowres_ft.recipe import load_recipe

    loaded = load_recipe(name, overrides or [])
    least.require(loaded, device)
    if least.on_processor(device):
        limits.expect(loaded.budget.memory)
    wanted = _numbers(sizes)
    from lowres_ft import curve as curves
    from lowres_ft import plotting, powerlaw
    from lowres_ft.cli.display import listening

    gc.freeze()  # the libraries stay, as in `recipe`
    if wanted is not None:
        powerlaw.require_enough(wanted)
    folder = curves.claim(out, loaded.name)
    with tempfile.TemporaryDirectory(prefix="lowres-ft-") as work, listening(quiet) as listen:
        scores = curves.measure(loaded, Path(work), sizes=wanted, seeds=seeds, device_name=device, listen=listen)
        found = curves.fitted(loaded, scores)
        curves.write(found, loaded, folder)
        plotting.draw(found, folder, loaded.name)
    if as_json:
        print(json.dumps({"recipe": loaded.name, "folder": str(folder), **found.to_json()}))
    else:
        _show(found, folder)


def _numbers(sizes: str | None) -> list[int] | None:
    if sizes is None:
        return None
    try:
        return [int(size) for size in sizes.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{sizes!r} is not whole numbers with commas between", param_hint="--sizes") from None


def _show(found: "Curve", folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("training rows", f"{found.metric} of each run", "mean", "fitted, 95 %")
    for point in found.points:
        law = found.law.curve(point.size)
        runs = " ".join(f"{score:.3f}" for score in point.scores)
        mean = sum(point.scores) / len(point.scores)
        table.add_row(f"{point.size:,}", runs, f"{mean:.3f}", f"{law.value:.3f} [{law.low:.3f}, {law.high:.3f}]")
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100).print(table)
    hidden, predicted = found.hidden, found.hidden.predicted
    print(
        f"check: {hidden.size:,} rows, predicted from the smaller sizes: "
        f"{predicted.value:.3f} [{predicted.low:.3f}, {predicted.high:.3f}], measured {hidden.mean:.3f}"
        + (", inside" if hidden.inside else ", OUTSIDE: the fit is not to be trusted")
    )
    print(found.told())
    print(f"written to {folder}: curve.json, curve.svg, curve.png")
