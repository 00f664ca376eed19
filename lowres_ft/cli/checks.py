"""Commands about data: check."""

import json
from typing import TYPE_CHECKING

import typer

from lowres_ft.cli.options import Json, Overrides, Quiet
from lowres_ft.cli.recipes import Name

if TYPE_CHECKING:
    from lowres_ft.checking import Checked

_ROWS = 5  # rows of a finding that are printed


def check(name: Name, overrides: Overrides = None, quiet: Quiet = False, as_json: Json = False) -> None:
    """Check the data of a recipe: labels, duplicates, leaks, damage, lengths."""
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
    counts = [sum(one.severity == name for one in found.findings) for name in ("error", "warning", "info")]
    print(f"{counts[0]} errors, {counts[1]} warnings, {counts[2]} infos")
