"""`python -m benchmarks.compare_methods`: methods of one recipe over several seeds, trained, scored and compared.

Each run is a process of its own and leaves a bundle, so that a session that was stopped goes on where it was; what
stands there already is not trained again. Bundles of one seed share their rows and are compared on its test rows.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lowres_ft.spec import figures
from lowres_ft.verdict import interval

METHODS: dict[str, tuple[str, ...]] = {
    "lora": (),
    "int8": ("model.quantize=int8",),
    "head": ("method.kind=head", "train.learning_rate=5e-3"),
    "full": ("method.kind=full", "train.learning_rate=5e-5"),
}
"""What each changes of the recipe."""


def main(
    recipe: Annotated[str, typer.Argument(help="A recipe that trains LoRA.")] = "sentiment-lora",
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="For all methods.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="May be repeated.  [default: all]")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="May be repeated.  [default: 7, 8 and 9]")] = None,
    out: Annotated[Path, typer.Option(help="Where bundles and the record are kept.")] = Path("runs/methods"),
) -> None:
    """Train what is missing, compare, write OUT/RECIPE.json and print a table."""
    chosen = method or list(METHODS)
    if unknown := set(chosen) - set(METHODS):
        raise typer.BadParameter(f"no method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    name = Path(recipe).stem
    record: dict[str, Any] = {"recipe": recipe, "overrides": overrides or [], "seeds": {}}
    for number in seed or [7, 8, 9]:
        bundles = {one: trained(recipe, one, number, overrides or [], out / f"{name}-{one}-{number}") for one in chosen}
        record["seeds"][str(number)] = compared(bundles)
        (out / f"{name}.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(record))


def trained(recipe: str, method: str, seed: int, overrides: list[str], folder: Path) -> Path:
    """Train a bundle, if it does not stand there.

    Raises:
        typer.Exit: Training failed.
        typer.BadParameter: What stands there was made otherwise.
    """
    changes = [*METHODS[method], *overrides, f"train.seed={seed}"]
    made = folder.with_name(f"{folder.name}.changes.json")
    if folder.exists():
        if not made.is_file() or json.loads(made.read_text(encoding="utf-8")) != [recipe, *changes]:
            raise typer.BadParameter(f"{folder} was made otherwise; remove it, or choose another --out")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    made.write_text(json.dumps([recipe, *changes]), encoding="utf-8")
    print(f"training {folder}", file=sys.stderr)
    _lowres("recipe", recipe, *changes, "--out", folder, "--quiet")
    return folder


def compared(bundles: dict[str, Path]) -> dict[str, Any]:
    """The reports of one seed's bundles, and how they compare."""
    found: dict[str, Any] = {"reports": {}}
    for method, folder in bundles.items():
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        keys = ("scores", "baselines", "measured", "trainable_parameters", "adapter_bytes", "calibration", "versions")
        found["reports"][method] = {key: report[key] for key in keys}
    if len(bundles) > 1:
        written = _lowres("compare", *bundles.values(), "--json", "--quiet")
        found["comparison"] = _of_methods(json.loads(written), list(bundles))
    return found


def _of_methods(comparison: dict[str, Any], methods: list[str]) -> dict[str, Any]:
    """A comparison for the record: bundles by their methods instead of folders, of the changed rows their number."""
    own = [one | {"name": method} for one, method in zip(comparison["bundles"], methods, strict=True)]
    return comparison | {"bundles": own, "methods": methods, "changed": len(comparison["changed"])}


def _lowres(*arguments: object) -> str:
    """What a command prints; its errors go to ours.

    Raises:
        typer.Exit: It failed.
    """
    command = [sys.executable, "-m", "lowres_ft", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)
    return done.stdout


def table(record: dict[str, Any]) -> str:
    """Scores by seed and method in Markdown, then what holds between the methods of each seed."""
    lines = ["| seed | method | score | trained parameters | MB | seconds | rows/s | ECE |", "|---" * 8 + "|"]
    verdicts = []
    for seed, found in record["seeds"].items():
        comparison = found.get("comparison")
        for place, (method, report) in enumerate(found["reports"].items()):
            speed = "" if comparison is None else f"{comparison['bundles'][place]['rows_per_second']:,.0f}"
            lines.append(f"| {seed} | {method} | {_measured(report)} | {speed} | {_ece(report)} |")
        verdicts += [] if comparison is None else [f"- seed {seed}: {line}" for line in _verdicts(comparison)]
    return "\n".join([*lines, "", *verdicts])


def _measured(report: dict[str, Any]) -> str:
    """A report's cells up to the seconds."""
    scores = report["scores"].get("test", report["scores"].get("validation", {}))
    name = next(iter(scores), None)
    score = "" if name is None else f"{name} {interval(scores[name])}"
    megabytes, seconds = report["adapter_bytes"] / 1e6, report["measured"]["train_seconds"]
    return f"{score} | {report['trainable_parameters']:,} | {megabytes:.3g} | {seconds:.0f}"


def _ece(report: dict[str, Any]) -> str:
    """The calibration error on test, without and with the temperature."""
    found = report["calibration"].get("test")
    return "" if found is None else " to ".join(figures(found["before"]["ece"], found["after"]["ece"]))


def _verdicts(comparison: dict[str, Any]) -> list[str]:
    """A line for each pair of methods."""
    lines = []
    for pair in comparison["pairs"]:
        first, second = (comparison["methods"][pair[place]] for place in ("first", "second"))
        better = {"first": first, "second": second}.get(pair["better"])
        outcome = "not clearly different" if better is None else f"{better} is better"
        gain = interval(pair["difference"], sign="+")
        lines.append(f"{second} over {first}: {gain}, p = {pair['p_holm']:.3g} (Holm); {outcome}")
    return lines


if __name__ == "__main__":
    typer.run(main)
