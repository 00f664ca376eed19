"""What a report shows beside scores: calibration, lengths, and the rows that were answered worst or in doubt."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lowres_ft import calibration as calibrations
from lowres_ft import data
from lowres_ft.batches import Tokens
from lowres_ft.data import Data
from lowres_ft.tasks.base import Ragged, Task

_BARS = 24  # of a histogram of lengths, at the most
_LONGEST = 1000  # characters of a text that is shown


def calibration(task: Task, tokens: Mapping[str, Tokens], predicted: Mapping[str, Ragged]) -> dict[str, Any]:
    """The temperature, and how well probabilities keep to shares without and with it, by split.

    Empty for a task whose answers have no probabilities.
    """
    found: dict[str, Any] = {}
    for name, outputs in predicted.items():
        both = {"before": task.uncalibrated(), "after": task}
        certain = {when: one.certainty(tokens[name].truth, outputs) for when, one in both.items()}
        told = {when: calibrations.reliability(sure) for when, sure in certain.items() if sure is not None}
        found |= {name: told} if told else {}
    return {"temperature": getattr(task, "temperature", None), "bins": calibrations.BINS, **found} if found else {}


def errors(task: Task, tokens: Mapping[str, Tokens], predicted: Mapping[str, Ragged]) -> dict[str, dict[str, int]]:
    """Wrong answers by their kind, for each split; empty where a task has no kinds."""
    found = {name: task.errors(tokens[name].truth, outputs) for name, outputs in predicted.items()}
    return {name: counts for name, counts in found.items() if counts}


def untold_temperature(task: Task, predicted: Mapping[str, Ragged]) -> str:
    """Why there is no temperature though one was wanted; empty where there is one, or none was."""
    if not getattr(task, "calibrate", False) or getattr(task, "temperature", None) is not None:
        return ""
    if "validation" not in predicted:
        return "probabilities are not calibrated: a temperature is chosen on validation rows, and there are none"
    return (
        "probabilities are not calibrated: on the validation rows no temperature is best, for their answers are all "
        "right, or no better than chance"
    )


def lengths(tokens: Tokens, most: int) -> dict[str, Any]:
    """A histogram of the tokens of rows, and how many fill the `most` tokens that a sequence may have."""
    sizes = tokens.row_lengths
    low, high = int(sizes.min()), int(sizes.max()) + 1
    width = -(-(high - low) // _BARS)
    edges = np.arange(low, high + width, width)
    counts, _ = np.histogram(sizes, edges)
    return {
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "median": float(np.median(sizes)),
        "longest": high - 1,
        "max_length": most,
        "at_max_length": int((sizes >= most).sum()),
    }


def rows(task: Task, found: Data, tokens: Mapping[str, Tokens], predicted: Mapping[str, Ragged], count: int) -> Any:
    """Rows of test (else of validation) by rank, such as `worst`, in words; none whose text stands in train.

    Empty where none are wanted or held out.
    """
    name = next((split for split in ("test", "validation") if split in predicted), None)
    if name is None or not count:
        return {}
    held = tokens[name].rows
    assert held is not None
    apart = data.apart(held, found.train)
    ranks = {}
    for rank, values in task.ranking(tokens[name].truth, predicted[name]).items():
        chosen = apart[np.argsort(-values[apart], kind="stable")[:count]]
        truth, outputs = tokens[name].truth.take(chosen), predicted[name].take(chosen)
        shown = zip(held.take(chosen).examples(task), truth, outputs, values[chosen].tolist(), strict=True)
        ranks[rank] = [{"where": one.where, **_cut(task.shown(one, *own)), rank: value} for one, *own, value in shown]
    return {"split": name, **ranks}


def _cut(shown: dict[str, str]) -> dict[str, str]:
    return {
        name: text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ... ({len(text):,} characters)"
        for name, text in shown.items()
    }
