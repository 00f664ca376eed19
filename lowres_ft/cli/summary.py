"""What a run prints at its end."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowres_ft.recipe import Recipe
from lowres_ft.sizes import show_bytes, show_seconds
from lowres_ft.verdict import baseline_name, compared, interval, metrics

if TYPE_CHECKING:
    from lowres_ft.preparing import Rehearsal

_SAMPLES = 3  # sample answers that are printed
_WIDTH = 100  # characters of one


def run(folder: Path, report: dict[str, Any], trial: str) -> str:
    """Scores beside the baselines, what it took, and what to do next, such as a `trial` prediction."""
    lines = [_scores(split, scores) for split, scores in report["scores"].items()]
    for name, scores in report["baselines"].items():
        gain = scores["gain"]
        lines.append(f"  {baseline_name(name):<28} {_value(scores, _first(scores))}; ours is {compared(gain)}")
    lines += _contrast(report)
    measured, trained = report["measured"], report["trainable_parameters"]
    lines += [
        f"trained {trained:,} parameters ({trained / report['parameters']:.1%}) in {measured['train_seconds']:.1f} s, "
        f"{measured['tokens_per_second']:,.0f} tokens/s; peak memory {measured['peak_bytes'] / 1e9:.2f} GB",
        f"bundle {folder}: {report['adapter_bytes'] / 1e6:.1f} MB of weights, best step {measured['best_step']}",
        f"try it: lowres-ft predict {folder} {trial}",
    ]
    return "\n".join(lines)


def _contrast(report: dict[str, Any]) -> list[str]:
    """Of a model that writes: sample answers before and after training, and what it forgot."""
    lines = []
    for sample in report.get("samples", [])[:_SAMPLES]:
        lines.append(f"  asked   {_short(sample['messages'][-1]['content'])}")
        lines += [f"    {when:<7} {_short(sample[when])}" for when in ("wanted", "before", "after")]
    if loss := report.get("control_loss"):
        lines.append(f"loss on unrelated text: {loss['before']:.3f} before, {loss['after']:.3f} after")
    return lines


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 4]} ..."


def rehearsal(recipe: Recipe, found: "Rehearsal") -> str:
    """What a run would do."""
    profile = found.profile
    rows = ", ".join(f"{count:,} {name}" for name, count in found.rows.items())
    share = found.trainable_parameters / profile.parameters
    plan = "  ".join(f"{key}={value}" for key, value in found.plan.model_dump(mode="json").items())
    return "\n".join(
        [
            f"{recipe.name}: {rows}" + (f"; labels {', '.join(found.labels)}" if found.labels else ""),
            f"{recipe.method.kind} on {found.adapted} layers trains {found.trainable_parameters:,} of "
            f"{profile.parameters:,} parameters ({share:.1%}) in {found.steps} steps",
            f"base: {profile.layers} layers of {profile.hidden}, {profile.attention_heads} attention heads, "
            f"vocabulary {profile.vocabulary:,}",
            f"plan: {plan}",
            *_expected(found),
            "nothing was trained",
        ]
    )


def _expected(found: "Rehearsal") -> list[str]:
    if found.memory_bytes is None or found.seconds is None:
        return ["what this base takes cannot be told before it runs"]
    return [f"about {show_seconds(found.seconds)} of training, and {show_bytes(found.memory_bytes)} at the peak"]


def rehearsal_json(found: "Rehearsal") -> str:
    """The same as JSON."""
    return json.dumps(asdict(found) | {"plan": found.plan.model_dump(mode="json")})


def scores_table(scores: dict[str, Any]) -> str:
    """Every metric with its interval, then each class or type of entities."""
    rows = [f"{name:<16} {interval(scores[name])}" for name in metrics(scores)]
    for part, counted in (("classes", "rows"), ("types", "entities")):
        for label, found in scores.get(part, {}).items():
            shown = (name for name in ("precision", "recall", "f1", "threshold") if name in found)
            figures = "  ".join(f"{name} {found[name]:.3f}" for name in shown)
            rows.append(f"  {label:<14} {figures}  {counted} {found['support']}")
    return "\n".join(rows)


def _scores(split: str, scores: dict[str, Any]) -> str:
    first, *others = metrics(scores)
    second = f"   {_value(scores, others[0])}" if others else ""
    return f"{split} ({scores[first]['count']:,} rows): {_value(scores, first)}{second}"


def _first(scores: dict[str, Any]) -> str:
    return next(iter(scores))


def _value(scores: dict[str, Any], name: str) -> str:
    return f"{name} {interval(scores[name])}"
