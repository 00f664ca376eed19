"""The law of learning curves: what is known is found, and intervals hold what they promise."""

import numpy as np
import pytest

from lowres_ft.powerlaw import Point, fit

SIZES = (100, 200, 400, 800, 1600)


def points(a: float, b: float, c: float, spread: float, seed: int, sizes=SIZES, seeds: int = 3) -> list[Point]:
    random = np.random.default_rng(seed)
    return [Point(n, tuple(a - b * n**-c + random.normal(0, spread * (1600 / n) ** 0.5, seeds)), spread) for n in sizes]


def test_a_curve_without_noise_is_found():
    law = fit(points(0.9, 2.0, 0.5, 1e-4, 0))
    assert law.runs(3200).value == pytest.approx(0.9 - 2.0 * 3200**-0.5, abs=0.003)
    assert law.gain(1600, 3200).value == pytest.approx(2.0 * (1600**-0.5 - 3200**-0.5), abs=0.003)


def test_intervals_hold_the_score_of_another_run_as_often_as_they_say():
    held, widths = 0, []
    for seed in range(60):
        random = np.random.default_rng(1000 + seed)
        a, c = random.uniform(0.8, 0.95), random.uniform(0.3, 0.8)
        b = random.uniform(0.1, 0.25) * 100**c
        *smaller, last = points(a, b, c, 0.008, seed)
        predicted = fit(smaller).runs(last.size, 3)
        held += predicted.low <= np.mean(last.scores) <= predicted.high
        widths.append(predicted.width)
    assert held >= 54
    assert np.median(widths) <= 0.06


def test_a_loss_falls_and_its_interval_is_in_order():
    law = fit([Point(n, (1 + 5 * n**-0.5, 1.01 + 5 * n**-0.5), 0.01) for n in SIZES], higher_is_better=False)
    found = law.curve(3200)
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(1.005 + 5 * 3200**-0.5, abs=0.02)
    assert law.gain(1600, 3200).value > 0


def test_scores_that_fall_with_more_rows_give_a_flat_curve():
    law = fit([Point(n, (0.8 - 0.05 * number,) * 3, 0.01) for number, n in enumerate(SIZES)])
    assert law.gain(1600, 3200).low >= 0
    assert law.gain(1600, 3200).value < 0.01


def test_no_score_passes_its_bound():
    law = fit([Point(n, (0.995, 0.997, 0.999), 0.002) for n in SIZES])
    assert law.curve(100_000).high <= 1.0


def test_single_runs_spread_more_than_their_mean_and_one_seed_is_enough_to_fit():
    many, one = fit(points(0.9, 2.0, 0.5, 0.01, 0)), fit(points(0.9, 2.0, 0.5, 0.01, 0, seeds=1))
    assert many.runs(1600).width > many.curve(1600).width
    assert one.runs(1600).width > 0


def test_two_sizes_are_no_curve():
    with pytest.raises(ValueError, match="a curve needs three sizes, not 2"):
        fit(points(0.9, 2.0, 0.5, 0.01, 0, sizes=(100, 200)))
