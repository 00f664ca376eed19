"""The learning curve score = a - b n^-c, fitted to a few sizes, with its uncertainty.

The exponent has a grid of values. For each of them a and b follow from weighted linear regression with a normal prior,
and so does the probability of what was seen. Draws from that mixture, without those in which a score would fall with
more rows or pass its bound, are the posterior; intervals are its percentiles.

What a size's mean may differ by from the curve is the sum of three variances: between seeds, over their number; of the
finite test set, as far as it differs from size to size (the same rows score all of them); and of the law itself, which
holds better near the largest size than far below it (curves begin flat, at chance). The variance between seeds, which
draw their rows, falls as 1 / n: that of all sizes together tells it (on Rotten Tomatoes, variance times rows is 0.12 to
0.18 from 62 to 2,000 rows).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowres_ft.errors import DataError

_EXPONENTS = np.geomspace(0.05, 2.0, 60)
_USUAL, _SPREAD = 0.5, 0.7  # of the exponents, log-normal: most curves of fine-tuned classifiers lie between 0.2 and 1
_DRAWS = 20_000
_SEED = 20_092
_OWN_NOISE = 0.5  # of the test set's standard deviation, that two sizes do not share
_MISFIT = 0.15  # of the distance to the largest size's score


@dataclass(frozen=True)
class Point:
    """Scores at a size, one for each seed."""

    size: int
    scores: tuple[float, ...]
    noise: float
    """Standard deviation of a score by the choice of test rows."""


@dataclass(frozen=True)
class Estimate:
    """A value with a 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """From the lower end to the upper one."""
        return self.high - self.low


@dataclass(frozen=True, eq=False)
class Law:
    """A fitted curve: draws of its parameters, (K,) each, and how single runs spread around it."""

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    sign: float
    """-1 where a smaller score is a better one: the curve is then of the negative score."""
    spread: float
    """Variance between seeds, times rows."""
    own: float
    """Standard deviation by the test set that two sizes do not share."""

    def curve(self, size: float) -> Estimate:
        """The mean score over seeds at a size."""
        return self._estimate(self._scores(size))

    def runs(self, size: float, count: int = 1) -> Estimate:
        """The mean score that `count` runs at a size will be measured at, on the same test rows."""
        random = np.random.default_rng(_SEED)
        scores = self._scores(size)
        deviation = (self.spread / size / count + self.own**2) ** 0.5
        return self._estimate(scores + random.normal(0, deviation, len(scores)))

    def gain(self, size: float, larger: float) -> Estimate:
        """How much better the mean score is at a larger size."""
        found = self._scores(larger) - self._scores(size)
        return Estimate(float(np.median(found)), *_ends(found))

    @property
    def parameters(self) -> dict[str, float]:
        """Medians of a, b and c of the score, or of the negative score."""
        return {name: float(np.median(getattr(self, name))) for name in "abc"}

    def _scores(self, size: float) -> np.ndarray:
        return np.asarray(self.a - self.b * size**-self.c)

    def _estimate(self, scores: np.ndarray) -> Estimate:
        low, high = sorted(self.sign * end for end in _ends(scores))
        return Estimate(float(self.sign * np.median(scores)), low, high)


def require_enough(sizes: Sequence[int]) -> list[int]:
    """Sizes to which a law can be fitted, and checked.

    Raises:
        DataError: There are fewer than four.
    """
    if (count := len(set(sizes))) < 4:
        raise DataError(
            f"a curve needs four sizes: three to fit it and one to check it, not {count}",
            hint="Name more with --sizes, or add rows.",
        )
    return list(sizes)


def fit(points: Sequence[Point], *, higher_is_better: bool = True, highest: float | None = 1.0) -> Law:
    """Fit the curve to at least three sizes; `highest` bounds a score (of one that falls: 0 always does).

    Raises:
        ValueError: There are fewer than three sizes.
    """
    if len(points) < 3:
        raise ValueError(f"a curve needs three sizes, not {len(points)}")
    points = sorted(points, key=lambda point: point.size)
    sign = 1.0 if higher_is_better else -1.0
    sizes = np.array([point.size for point in points], dtype=float)
    means = np.array([sign * np.mean(point.scores) for point in points])
    spread = _spread(points)
    counts = np.array([len(point.scores) for point in points])
    own = _OWN_NOISE * float(np.mean([point.noise for point in points]))
    total = spread / sizes / counts + own**2 + (_MISFIT * (means - means[-1])) ** 2 + 1e-8
    a, b, c = _draw(sizes, means, total, (highest or np.inf) if higher_is_better else 0.0)
    return Law(a, b, c, sign, spread, own)


def _spread(points: Sequence[Point]) -> float:
    """Variance between seeds, times rows; without a second seed, that of the test set at the largest size."""
    freedom = sum(len(point.scores) - 1 for point in points)
    if not freedom:
        return points[-1].noise ** 2 * points[-1].size
    squares = [point.size * float(np.var(point.scores)) * len(point.scores) for point in points]
    return sum(squares) / freedom


def _draw(
    sizes: np.ndarray, means: np.ndarray, variances: np.ndarray, highest: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws of a, b and c, (K,) each."""
    random = np.random.default_rng(_SEED)
    spread = max(float(np.ptp(means)), 0.02)
    prior_mean = np.array([means[-1] + spread / 4, spread])
    prior = np.diag(1 / np.array([2 * spread, 4 * spread]) ** 2)
    evidence, centres, roots = [], [], []
    for exponent in _EXPONENTS:
        # b is measured at the smallest size, so that its prior means the same for every exponent.
        design = np.stack([np.ones_like(sizes), -((sizes / sizes[0]) ** -exponent)], axis=1)
        precision = prior + (design.T / variances) @ design
        centre = np.linalg.solve(precision, prior @ prior_mean + (design.T / variances) @ means)
        left = means - design @ centre
        fitness = -0.5 * ((left**2 / variances).sum() + (centre - prior_mean) @ prior @ (centre - prior_mean))
        prior_of_exponent = -0.5 * (np.log(exponent / _USUAL) / _SPREAD) ** 2
        evidence.append(fitness - 0.5 * np.linalg.slogdet(precision)[1] + prior_of_exponent)
        centres.append(centre)
        roots.append(np.linalg.cholesky(np.linalg.inv(precision)))
    weights = np.exp(np.array(evidence) - max(evidence))
    chosen = random.choice(len(_EXPONENTS), size=_DRAWS, p=weights / weights.sum())
    normal = random.normal(size=(_DRAWS, 2))
    drawn = np.array(centres)[chosen] + np.einsum("kij,kj->ki", np.array(roots)[chosen], normal)
    c = _EXPONENTS[chosen]
    possible = (drawn[:, 1] >= 0) & (drawn[:, 0] <= highest)
    if possible.sum() < _DRAWS // 100:  # scores that fall with more rows: a flat curve is what is left
        drawn[:, 1] = np.maximum(drawn[:, 1], 0)
        drawn[:, 0] = np.minimum(drawn[:, 0], highest)
        possible = np.ones(_DRAWS, dtype=bool)
    return drawn[possible, 0], drawn[possible, 1] * sizes[0] ** c[possible], c[possible]


def _ends(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
