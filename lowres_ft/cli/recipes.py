"""Commands about recipes: recipe, list, show and new."""

import gc
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowres_ft.cli.options import Device, Json, Overrides, Quiet
from lowres_ft.errors import LowresError

if TYPE_CHECKING:
    from lowres_ft.recipe import Recipe

Name = Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe, or the path of one.", show_default=False)]


def recipe(
    name: Name,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the bundle.  [default: runs/NAME]")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe, data and base, print the plan, and train nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was interrupted, from its newest checkpoint.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Remove the checkpoints of a run that was interrupted, and begin anew.")
    ] = False,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run a recipe: from data to a measured bundle."""
    from lowres_ft import least, limits
    from lowres_ft.recipe import load_recipe

    if resume and restart:
        raise LowresError("--resume goes on and --restart begins anew: not both", hint="Leave one of them out.")
    loaded = load_recipe(name, overrides or [])
    least.require(loaded, device)
    if least.on_processor(device):
        limits.expect(loaded.budget.memory)
    # The heavy libraries come after the recipe is known to be right.
    from lowres_ft import pipeline, preparing
    from lowres_ft.cli import summary
    from lowres_ft.cli.display import listening
    from lowres_ft.device import is_first

    gc.freeze()  # the libraries stay until the process ends: a run, which looks for garbage, need not look there
    going_on = True if resume else False if restart else None
    if going_on is None and not (dry_run or quiet or as_json):
        going_on = _asked(loaded, out)
    with listening(quiet) as listen:
        if dry_run:
            rehearsal = preparing.rehearse(loaded, device_name=device, listen=listen)
        else:
            bundle = pipeline.run(loaded, out, resume=going_on, device_name=device, listen=listen)
    if not is_first():
        return
    if dry_run:
        print(summary.rehearsal_json(rehearsal) if as_json else summary.rehearsal(loaded, rehearsal))
        return
    report = json.loads((bundle.folder / "report.json").read_text(encoding="utf-8"))
    print(
        json.dumps({"bundle": str(bundle.folder), **report})
        if as_json
        else summary.run(bundle.folder, report, bundle.recipe.task.trial)
    )


def _asked(loaded: "Recipe", out: Path | None) -> bool | None:
    """On a terminal, ask whether an interrupted run of the same experiment goes on; None where nothing was asked."""
    from lowres_ft.device import is_first
    from lowres_ft.runs import unfinished

    if not (sys.stdin.isatty() and sys.stderr.isatty() and is_first()):
        return None
    found = unfinished(loaded, out)
    if found is None or not found.same:
        return None
    print(f"{found.out}.run holds an unfinished run of this recipe.", file=sys.stderr)
    question = f"Go on from step {found.checkpoint.step} of {found.checkpoint.total}?"
    return typer.confirm(question, default=True, err=True)


def list_(as_json: Json = False) -> None:
    """List the shipped recipes."""
    from lowres_ft.recipe import load_recipe, shipped

    recipes = [load_recipe(name) for name in shipped()]
    if as_json:
        fields = [{"name": r.name, "summary": r.summary, "task": r.task.kind, "method": r.method.kind} for r in recipes]
        print(json.dumps(fields))
        return
    width = max(len(recipe.name) for recipe in recipes)
    for found in recipes:
        print(f"{found.name:<{width}}  {found.summary}")


def show(name: Name, overrides: Overrides = None, as_json: Json = False) -> None:
    """Print a recipe in full, every default written out."""
    from lowres_ft.recipe import load_recipe

    found = load_recipe(name, overrides or [])
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    print(json.dumps(found.model_dump(mode="json")) if as_json else found.to_yaml(), end="\n" if as_json else "")


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new recipe.", show_default=False)],
    from_: Annotated[
        str | None,
        typer.Option("--from", help="Recipe to start from.  [default: as the rows are; else sentiment-lora]"),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="Your rows: task, columns and labels are guessed.")] = None,
    as_json: Json = False,
) -> None:
    """Write a recipe of your own, NAME.yaml in this folder."""
    from lowres_ft import guess

    written: dict[str, Any] = guess.new(name, from_, data)
    if as_json:
        print(json.dumps(written))
        return
    for line in written["guessed"]:
        print(line)
    print(f"wrote {written['path']}; run it with: lowres-ft recipe {written['path']}")
