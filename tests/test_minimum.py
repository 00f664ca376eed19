"""Minima are scipy's, bit by bit."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from lowres_ft import minimum

FUNCTIONS = {
    "square": lambda x: (x - 0.3) ** 2,
    "quartic": lambda x: x**4 - 3 * x**2 + x,
    "loss": lambda x: math.log1p(math.exp(-2 * math.exp(-x))) + 0.3 * math.exp(-x),
    "corner": lambda x: abs(x - 1.1),
    "falling": lambda x: -x,
    "rising": math.atan,
    "flat": lambda x: 1.0,
    "steps": lambda x: float(math.floor(5 * x * x)),
    "waves": lambda x: math.sin(9 * x) + 0.1 * x * x,
    "none": lambda x: math.nan,
}


def same(name: str, low: float, high: float) -> None:
    asked: list[float] = []
    function = FUNCTIONS[name]

    def noted(x: float) -> float:
        asked.append(float(x))
        return function(x)

    theirs = minimize_scalar(noted, bounds=(low, high), method="bounded")
    before = asked.copy()
    asked.clear()
    place, value = minimum.bounded(noted, low, high)
    assert asked == before
    assert place == theirs.x
    assert value == theirs.fun or math.isnan(value)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_within_the_bounds_of_temperatures(name):
    same(name, math.log(0.01), math.log(100))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FUNCTIONS)), st.floats(-6, 6), st.floats(0, 9))
def test_within_any_bounds(name, low, width):
    same(name, low, low + width)
