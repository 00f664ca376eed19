"""Commands that tell before anything is loaded: plan, models and doctor."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from lowres_ft.cli.options import Device, Json, Overrides, Quiet
from lowres_ft.cli.recipes import Name
from lowres_ft.sizes import show_bytes, show_seconds

if TYPE_CHECKING:
    from lowres_ft.forecast import Forecast, Outlook
    from lowres_ft.recipe import Recipe

_TERMS = {
    "libraries": "libraries",
    "linears": "linear layers",
    "embeddings": "embeddings",
    "others": "other weights",
    "heads": "heads",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "best": "copy of the best step",
    "activations": "activations",
    "logits": "logits and loss",
    "work": "work of the backward pass",
    "converted": "converted codes",
    "allocator": "allocator",
    "holes": "holes in the heap",
}


def plan(
    name: Name,
    overrides: Overrides = None,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="Devices that share each step, a process on each.")
    ] = 1,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Tell memory and time of a run, here and elsewhere."""
    from lowres_ft import least
    from lowres_ft.recipe import load_recipe

    loaded = load_recipe(name, overrides or [])
    least.require_libraries(loaded, device)
    from lowres_ft import forecast
    from lowres_ft.cli.display import listening
    from lowres_ft.events import Fetching

    with listening(quiet) as listen:
        found = forecast.outlook(
            loaded,
            device_name=device,
            processes=processes,
            progress=lambda what, done, total: listen(Fetching(what, done, total)),
        )
    if as_json:
        here, others = found.here.to_json(), [other.to_json() for other in found.others]
        print(json.dumps({"recipe": loaded.name, "processes": processes, "here": here, "others": others}))
        return
    print(_outlook(loaded, found))


def _outlook(recipe: "Recipe", found: "Outlook") -> str:
    """Terms of this machine, then a line for each device."""
    here, profile = found.here, found.profile
    terms = [(_TERMS[name], size) for name, size in here.memory.terms.items() if size]
    lines = [
        f"{recipe.name}: {recipe.method.kind} trains {found.trainable_parameters:,} of {profile.parameters:,} "
        f"parameters of {recipe.model.base}",
        f"on {here.target.machine.name} in {here.plan.dtype}, texts of {recipe.task.max_length} tokens, "
        f"micro-batches of {here.plan.micro_batch_tokens:,}:",
        *(f"  {name:<26} {show_bytes(size):>9}" for name, size in terms),
        f"  {'peak':<26} {show_bytes(here.memory.total):>9}  (while loading {show_bytes(here.memory.loading)})",
        "",
        f"{'device':<18} {'has':>9} {'needs':>9}  {'fits':<4} {'tokens/s':>9} {'a step':>8}  settings",
    ]
    last = "how long a run takes follows from its rows, too: lowres-ft recipe NAME --dry-run"
    return "\n".join([*lines, *(_line(one) for one in (here, *found.others)), *_remedies(found), last])


def _line(one: "Forecast") -> str:
    name = one.target.machine.name if one.target.machine.host == "" else "this machine"
    has, needs, fits = show_bytes(one.target.memory), show_bytes(one.memory.total), "yes" if one.fits else "no"
    return (
        f"{name:<18} {has:>9} {needs:>9}  {fits:<4} {one.tokens_per_second:>9,.0f} "
        f"{show_seconds(one.step_seconds):>8}  {', '.join(one.settings) or 'as they are'}"
    )


def _remedies(found: "Outlook") -> list[str]:
    """What would help where it does not fit here."""
    return [f"{one.change} saves {show_bytes(one.saves)}" for one in found.here.remedies]


def models(
    task: Annotated[str | None, typer.Option("--task", help="classification, ner or chat.")] = None,
    language: Annotated[str | None, typer.Option("--language", help="A code such as en or zh.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """List bases that serve well, and what fits here."""
    from lowres_ft import catalogue

    entries = catalogue.chosen(task, language)
    # The heavy libraries come after the question is known to be right.
    from lowres_ft import forecast
    from lowres_ft.device import find

    machine = find(device)
    width = max(len(entry.name) for entry in entries)
    if not as_json:
        titles = f"{'base':<{width}} {'weights':>8} {'needs':>9} {'fits':<4} {'tokens/s':>8}"
        print(f"{titles}  recipe, licence, languages, context")
    listed = []
    for entry in entries:
        here = forecast.of_entry(entry, task, machine)
        listed.append(entry.model_dump(mode="json", exclude={"config"}) | {"here": here})
        if not as_json:
            print(
                f"{entry.name:<{width}} {entry.parameters:>6} M {show_bytes(here['memory_bytes']):>9} "
                f"{'yes' if here['fits'] else 'no':<4} {here['tokens_per_second']:>8,.0f}  {here['recipe']}, "
                f"{entry.licence}, {entry.languages}, {entry.context:,} tokens"
            )
    if as_json:
        print(json.dumps(listed))


def doctor(
    probe: Annotated[bool, typer.Option("--probe/--no-probe", help="Measure speed for a few seconds.")] = True,
    as_json: Json = False,
) -> None:
    """Look at this machine, its libraries and its speed."""
    from lowres_ft import doctor

    found = doctor.examine(probe=probe)
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        width = max(len(finding.what) for finding in found.findings)
        for finding in found.findings:
            print(f"{finding.what:<{width}}  {finding.state:<7}  {finding.found}")
            if finding.advice:
                print(f"{'':<{width}}           {finding.advice}")
    if not found.usable:
        raise typer.Exit(2)
