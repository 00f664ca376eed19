"""Calibration: of the answers that are given with probability p, a share p should be right.

A temperature T > 0 divides a model's logits before they become probabilities. It is chosen where the mean negative
log-likelihood on validation is least, and changes no answer (Guo et al. 2017, arXiv:1706.04599). How far probabilities
are from shares is told by the expected calibration error: the mean over bins, by their numbers of answers, of
|share of right answers - mean probability|. The bins hold equally many answers (Nguyen and O'Connor 2015,
arXiv:1508.05154), for most answers of a good model have probabilities near 1.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lowres_ft import minimum

if TYPE_CHECKING:
    import numpy as np

BINS = 15
_RANGE = 100.0  # temperatures from 1 / 100 to 100 are tried
_SURE = 600.0  # a logit's lead, divided by T, at the most: beyond, the other probability would be no number but 0


def temperature(mean_loss: Callable[[float], float], lead: float) -> float | None:
    """The T at which `mean_loss(T)`, the mean negative log-likelihood of logits / T, is least, in four digits.

    `lead` is the greatest by which a logit lies above another, or from 0 where each has a probability by itself.

    None where there is no least: of answers that are all right, ever smaller temperatures are better, and ever greater
    ones where the logits tell nothing.
    """
    least = max(1 / _RANGE, lead / _SURE)
    if least >= _RANGE:
        return None
    place, loss = minimum.bounded(lambda log: mean_loss(math.exp(log)), math.log(least), math.log(_RANGE))
    if min(mean_loss(least), mean_loss(_RANGE)) <= loss:
        return None
    return float(f"{math.exp(place):.4g}")


def reliability(certainty: "np.ndarray") -> dict[str, Any]:
    """The expected calibration error, the mean negative log-likelihood, and the bins of a reliability diagram.

    Args:
        certainty: (N, 3) of each answer its probability, 1 where it is right, and the truth's log-probability.

    Answers of equal probability share a bin, so that the order of rows changes nothing; so some bins may be larger
    than others, or empty and left out.
    """
    import numpy as np

    probability, right = certainty[:, 0], certainty[:, 1]
    before = np.searchsorted(np.sort(probability), probability)  # answers of smaller probabilities
    place = before * BINS // max(1, len(certainty))
    count = np.bincount(place, minlength=BINS)
    filled = count > 0
    means = [
        np.bincount(place, weights=values, minlength=BINS)[filled] / count[filled] for values in (probability, right)
    ]
    gaps = np.abs(means[1] - means[0])
    return {
        "ece": float((gaps * count[filled]).sum() / max(1, len(certainty))),
        "log_loss": float(-certainty[:, 2].mean()) if len(certainty) else 0.0,
        "count": len(certainty),
        "bins": [
            {"probability": float(mean), "right": float(share), "count": int(size)}
            for mean, share, size in zip(*means, count[filled], strict=True)
        ],
    }
