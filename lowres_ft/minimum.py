"""The minimum of a function of one number within bounds, by Brent's method (1973), as scipy finds it to the last bit.

A task looks for one at each evaluation, and scipy.optimize would take 36 MB from then on.
"""

import math
from collections.abc import Callable

_GOLDEN = 0.5 * (3.0 - math.sqrt(5.0))
_ROOT = math.sqrt(2.2e-16)  # of the relative error of a number: places that are nearer give no other value
_WITHIN = 1e-5
_MOST = 500

_Point = tuple[float, float]
"""A place, and the function's value there."""


def bounded(function: Callable[[float], float], low: float, high: float) -> _Point:
    """The place between `low` and `high` where a function is least, within 1e-5, and its value there."""
    place = low + _GOLDEN * (high - low)
    best = second = third = (place, function(place))
    step = before = 0.0
    for _ in range(_MOST - 1):
        least = _ROOT * abs(best[0]) + _WITHIN / 3.0
        if not abs(best[0] - 0.5 * (low + high)) > 2.0 * least - 0.5 * (high - low):
            break
        step, before = _step((best, second, third), (low, high), (step, before), least)
        place = best[0] + math.copysign(max(abs(step), least), step)
        tried = place, function(place)
        worse = best if tried[1] <= best[1] else tried
        if (worse is best) == (place >= best[0]):
            low = worse[0]
        else:
            high = worse[0]
        if worse is best:
            best, second, third = tried, best, second
        elif tried[1] <= second[1] or second[0] == best[0]:
            second, third = tried, second
        elif tried[1] <= third[1] or third[0] in (best[0], second[0]):
            third = tried
    return best


def _step(
    points: tuple[_Point, _Point, _Point], bounds: tuple[float, float], steps: tuple[float, float], least: float
) -> tuple[float, float]:
    """The next step and the one that it is measured by: to the lowest place of a parabola, or a golden section."""
    (x, value), second, third = points
    (low, high), (step, before) = bounds, steps
    if abs(before) > least:
        r = (x - second[0]) * (value - third[1])
        q = (x - third[0]) * (value - second[1])
        p = (x - third[0]) * q - (x - second[0]) * r
        q = 2.0 * (q - r)
        p, q = -p if q > 0.0 else p, abs(q)
        if abs(p) < abs(0.5 * q * before) and q * (low - x) < p < q * (high - x):
            taken = (p + 0.0) / q
            if x + taken - low < 2.0 * least or high - (x + taken) < 2.0 * least:
                taken = math.copysign(least, 0.5 * (low + high) - x)
            return taken, step
    far = (low if x >= 0.5 * (low + high) else high) - x
    return _GOLDEN * far, far
