"""`python -m benchmarks.quality`: does what is held in fewer bits, or trained in fewer weights, answer as well?

Each variant trains a shipped recipe on the same splits with the same seeds, and answers the same test rows. The
differences from LoRA in bf16 are paired: texts are drawn, each with all its answers, of all seeds. What was trained
before is read again from `--work`, so that a run that was cut off goes on.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

_RESAMPLES = 10_000
_WITHIN = 0.01  # what a quantized base may lose, as a share of the rows
_LORA = "sentiment-lora"
REFERENCE = "bf16"


@dataclass(frozen=True)
class Variant:
    """A recipe and what is changed in it."""

    recipe: str
    changed: tuple[str, ...] = ()


VARIANTS: Mapping[str, Variant] = {
    REFERENCE: Variant(_LORA, ("model.dtype=bfloat16",)),
    "fp32": Variant(_LORA, ("model.dtype=float32",)),
    "int8": Variant(_LORA, ("model.dtype=bfloat16", "model.quantize=int8")),
    "nf4": Variant(_LORA, ("model.dtype=bfloat16", "model.quantize=nf4")),
    "int8 embeddings": Variant(
        _LORA, ("model.dtype=bfloat16", "model.quantize=int8", "model.quantize_embeddings=true")
    ),
    "full": Variant("sentiment-full"),
}


@dataclass(frozen=True)
class Gap:
    """How much more of the rows a variant answers rightly than the reference, with its 95 % interval."""

    value: float
    low: float
    high: float


def gap(ours: Sequence[Mapping[str, bool]], theirs: Sequence[Mapping[str, bool]]) -> Gap:
    """The paired difference of two variants' right answers by text, one mapping for each seed.

    Texts are resampled, since the answers of several seeds to one text are not independent.
    """
    gains: dict[str, list[int]] = {}
    for mine, other in zip(ours, theirs, strict=True):
        if mine.keys() != other.keys():
            raise ValueError("the variants did not answer the same rows")
        for text, right in mine.items():
            gains.setdefault(text, []).append(int(right) - int(other[text]))
    sums = np.array([sum(each) for each in gains.values()])
    counts = np.array([len(each) for each in gains.values()])
    random = np.random.default_rng(0)
    drawn = (random.integers(0, len(sums), len(sums)) for _ in range(_RESAMPLES))
    low, high = np.percentile([sums[rows].sum() / counts[rows].sum() for rows in drawn], [2.5, 97.5])
    return Gap(float(sums.sum() / counts.sum()), float(low), float(high))


def main(
    seeds: Annotated[str, typer.Option(help="Seeds of split, order, adapter and dropout.")] = "7,8,9",
    variant: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    change: Annotated[list[str] | None, typer.Option(help="A change of all recipes, such as data.limit=200.")] = None,
    work: Annotated[Path, typer.Option(help="Where bundles and answers are kept.")] = Path("runs/quality"),
    out: Annotated[Path | None, typer.Option(help="The record.  [default: WORK/quality.json]")] = None,
) -> None:
    """Train all variants with all seeds; print accuracies and their differences; write a record."""
    names = [REFERENCE, *(name for name in variant or VARIANTS if name != REFERENCE)]
    numbers = [int(seed) for seed in seeds.split(",")]
    answered: dict[str, list[dict[str, bool]]] = {name: [] for name in names}
    for seed in numbers:
        for name in names:
            answered[name].append(_answered(VARIANTS[name], seed, change or [], work / f"{name}-{seed}"))
            print(f"{name}, seed {seed}: {accuracy(answered[name][-1]):.4f}", flush=True)
    record = summary(answered, numbers)
    out = out or work / "quality.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    Console().print(shown(record))


def _answered(variant: Variant, seed: int, change: Sequence[str], folder: Path) -> dict[str, bool]:
    """Whether each test row (place and text) is answered rightly by a variant, trained now or before."""
    kept = folder.with_suffix(".answers.json")
    if kept.is_file():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    import tempfile

    import lowres_ft
    from lowres_ft import batches, device, evaluate, prediction

    recipe = lowres_ft.load_recipe(variant.recipe, [f"train.seed={seed}", *variant.changed, *change])
    bundle = lowres_ft.open_bundle(folder) if folder.is_dir() else lowres_ft.run(recipe, folder)
    with tempfile.TemporaryDirectory() as room:
        rows, _ = prediction.held_out(bundle, Path(room), None)
        adapted, plan = bundle.load(device.find("auto"))
        tokens = batches.tokenize(adapted, rows, Path(room) / "test")
        predicted = evaluate.outputs(adapted, tokens, plan).values.argmax(1)
        examples = rows.examples(bundle.recipe.task)
        right = (predicted == tokens.truth.values).tolist()
        found = {f"{example.where} {example.text}": each for example, each in zip(examples, right, strict=True)}
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def accuracy(answers: Mapping[str, bool]) -> float:
    """The share of right answers."""
    return sum(answers.values()) / len(answers)


def summary(answered: Mapping[str, Sequence[Mapping[str, bool]]], seeds: Sequence[int]) -> dict[str, Any]:
    """The record: accuracies by seed, and each variant's gap to the reference."""
    from lowres_ft.device import versions

    found = {
        name: {
            "accuracy": [accuracy(each) for each in answers],
            "rows": [len(each) for each in answers],
            "gap": vars(gap(answers, answered[REFERENCE])),
        }
        for name, answers in answered.items()
    }
    return {"seeds": list(seeds), "reference": REFERENCE, "variants": found, "versions": versions()}


def shown(record: Mapping[str, Any]) -> Table:
    """The record as a table."""
    table = Table(title="Rotten Tomatoes, MiniLM: accuracy on the test rows")
    for heading in ("variant", *(f"seed {seed}" for seed in record["seeds"]), "mean", "against bf16 [95 %]"):
        table.add_column(heading)
    for name, found in record["variants"].items():
        scores, difference = found["accuracy"], found["gap"]
        told = "{value:+.4f} [{low:+.4f}, {high:+.4f}]".format(**difference) if name != record["reference"] else ""
        if told and difference["low"] < -_WITHIN:
            told += f"  (a loss of more than {_WITHIN} is not excluded)"
        table.add_row(name, *(f"{score:.4f}" for score in scores), f"{np.mean(scores):.4f}", told)
    return table


if __name__ == "__main__":
    typer.run(main)
