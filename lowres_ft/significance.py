"""Whether a difference may be chance: tests of paired answers, and what several of them at once cost."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def mcnemar(first: "np.ndarray", second: "np.ndarray") -> float:
    """The p-value of McNemar's exact test: of the rows that one of two models gets right, is the share of each a half?

    Args:
        first: (R,) whether the first model is right.
        second: (R,) whether the second one is.
    """
    from scipy.stats import binomtest

    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second).pvalue)


def bootstrap(samples: Sequence[float]) -> float:
    """The two-sided p-value of a difference that was resampled: twice the share of samples on the rarer side of zero.

    One sample is added to that side, for no finite number of samples shows a p-value of 0 (Davison and Hinkley 1997).
    """
    import numpy as np

    values = np.asarray(samples)
    rarer = min(int((values <= 0).sum()), int((values >= 0).sum()))
    return min(1.0, 2 * (rarer + 1) / (len(values) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected so that all the tests together err with their level (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    found, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        found[place] = largest
    return found
