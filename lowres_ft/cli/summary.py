"""What a run prints at its end."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowres_ft.recipe import Recipe

if TYPE_CHECKING:
    from lowres_ft.pipeline import Rehearsal

_NAMES = {"majority": "majority class", "tfidf": "TF-IDF + logistic regression"}


def run(folder: Path, report: dict[str, Any]) -> str:
    """Scores beside the baselines, what it took, and what to do next."""
    lines = [_scores(split, scores) for split, scores in report["scores"].items()]
    for name, scores in report["baselines"].items():
        gain = scores["gain"]
        lines.append(f"  {_NAMES.get(name, name):<28} {_value(scores, _first(scores))}; ours is {_compared(gain)}")
    measured, trained = report["measured"], report["trainable_parameters"]
    lines += [
        f"trained {trained:,} parameters ({trained / report['parameters']:.1%}) in {measured['train_seconds']:.1f} s, "
        f"{measured['tokens_per_second']:,.0f} tokens/s; peak memory {measured['peak_bytes'] / 1e9:.2f} GB",
        f"bundle {folder}: {report['adapter_bytes'] / 1e6:.1f} MB of weights, best step {measured['best_step']}",
        f'try it: lowres-ft predict {folder} "your text"',
    ]
    return "\n".join(lines)


def rehearsal(recipe: Recipe, found: "Rehearsal") -> str:
    """What a run would do."""
    profile = found.profile
    rows = ", ".join(f"{count:,} {name}" for name, count in found.rows.items())
    share = found.trainable_parameters / profile.parameters
    plan = "  ".join(f"{key}={value}" for key, value in found.plan.model_dump(mode="json").items())
    return "\n".join(
        [
            f"{recipe.name}: {rows}; labels {', '.join(found.labels)}",
            f"{recipe.method.kind} on {found.adapted} layers trains {found.trainable_parameters:,} of "
            f"{profile.parameters:,} parameters ({share:.1%}) in {found.steps} steps",
            f"base: {profile.layers} layers of {profile.hidden}, {profile.attention_heads} attention heads, "
            f"vocabulary {profile.vocabulary:,}",
            f"plan: {plan}",
            "nothing was trained",
        ]
    )


def rehearsal_json(found: "Rehearsal") -> str:
    """The same as JSON."""
    return json.dumps(asdict(found) | {"plan": found.plan.model_dump(mode="json")})


def scores_table(scores: dict[str, Any]) -> str:
    """Every metric with its interval, then each class."""
    rows = [f"{name:<16} {_interval(value)}" for name, value in scores.items() if "low" in value]
    classes = scores.get("classes", {})
    for label, found in classes.items():
        figures = "  ".join(f"{name} {found[name]:.3f}" for name in ("precision", "recall", "f1"))
        rows.append(f"  {label:<14} {figures}  rows {found['support']}")
    return "\n".join(rows)


def _scores(split: str, scores: dict[str, Any]) -> str:
    first, *others = [name for name in scores if isinstance(scores[name], dict) and "low" in scores[name]]
    second = f"   {_value(scores, others[0])}" if others else ""
    return f"{split} ({scores[first]['count']:,} rows): {_value(scores, first)}{second}"


def _compared(gain: dict[str, Any]) -> str:
    """In words: better and worse are only said where the interval is on one side of zero."""
    if gain["low"] > 0:
        return f"better by {_interval(gain)}"
    if gain["high"] < 0:
        return f"WORSE by {-gain['value']:.3f} [{-gain['high']:.3f}, {-gain['low']:.3f}]"
    return f"not clearly different: {gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"


def _first(scores: dict[str, Any]) -> str:
    return next(iter(scores))


def _value(scores: dict[str, Any], name: str) -> str:
    return f"{name} {_interval(scores[name])}"


def _interval(value: dict[str, Any]) -> str:
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
