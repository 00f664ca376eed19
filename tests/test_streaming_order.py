"""In which order layers are asked for that pass through room for two of them."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lowres_ft.streaming import Stream


@pytest.fixture
def line() -> Iterator[tuple[nn.Sequential, "Recorded"]]:
    layers = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    place = Recorded()
    stream = Stream(list(layers), place)
    yield layers, place
    stream.end()


class Recorded:
    """A place that notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int | None]] = []

    def show(self, at: int, ahead: int | None) -> None:
        self.asked.append((at, ahead))

    def resident(self) -> set[int]:
        return set()

    def settle(self) -> None:
        pass


def test_layers_are_asked_for_in_the_order_in_which_they_compute(line: tuple[nn.Sequential, Recorded]):
    layers, place = line
    layers(torch.ones(1, 2)).sum().backward()
    forward = [(0, 1), (1, 2), (2, 3), (3, None)]
    assert place.asked == [*forward, (3, 2), (2, 1), (1, 0), (0, None)]
    place.asked.clear()
    with torch.inference_mode():
        layers(torch.ones(1, 2))
    assert place.asked == forward
