"""Scores in words: better and worse are only said where an interval is on one side of zero."""

from collections.abc import Mapping
from typing import Any

from lowres_ft.spec import figures

_FIGURES = {"value", "low", "high", "count"}
_BASELINES = {
    "majority": "majority class",
    "tfidf": "TF-IDF + logistic regression",
    "gazetteer": "entities of train by heart",
    "base": "untouched base",
}


def baseline_name(name: str) -> str:
    """A baseline's name in words."""
    return _BASELINES.get(name, name)


def metrics(scores: Mapping[str, Any]) -> list[str]:
    """Names of the metrics; what else there is by name, such as a class called 'low', has no interval."""
    return [name for name, value in scores.items() if isinstance(value, dict) and value.keys() >= _FIGURES]


def interval(value: Mapping[str, Any], sign: str = "") -> str:
    """A score and its interval."""
    shown, low, high = figures(value["value"], value["low"], value["high"], sign=sign)
    return f"{shown} [{low}, {high}]"


def compared(gain: Mapping[str, Any]) -> str:
    """How much better ours is."""
    if gain["low"] > 0:
        return f"better by {interval(gain)}"
    if gain["high"] < 0:
        return f"WORSE by {interval({'value': -gain['value'], 'low': -gain['high'], 'high': -gain['low']})}"
    return f"not clearly different: {interval(gain, sign='+')}"


def sentence(report: Mapping[str, Any]) -> tuple[str, str]:
    """A report in one sentence, and what it comes to: 'better', 'worse', 'unclear' or 'alone'.

    Ours is held against the baseline over which its gain is the least.
    """
    scores, baselines = report["scores"], report["baselines"]
    if not scores:
        return "No rows were held out, so nothing can be said of its quality.", "alone"
    split = "test" if "test" in scores else next(iter(scores))
    first = metrics(scores[split])[0]
    own = f"{first} {interval(scores[split][first])} on {scores[split][first]['count']:,} rows of {split}"
    if not baselines:
        return f"It reaches {own}, which no baseline was compared with.", "alone"
    name = min(baselines, key=lambda name: baselines[name]["gain"]["value"])
    gain = baselines[name]["gain"]
    other = f"{baseline_name(name)} ({interval(baselines[name][first])})"
    if gain["low"] > 0:
        return f"Better than {other} by {interval(gain)}: it reaches {own}.", "better"
    if gain["high"] < 0:
        turned = interval({"value": -gain["value"], "low": -gain["high"], "high": -gain["low"]})
        return f"Worse than {other} by {turned}: it reaches {own}.", "worse"
    return f"Not clearly better than {other}: the gain is {interval(gain, sign='+')}; it reaches {own}.", "unclear"
