"""How long a micro-batch takes by its size: told from accounts of a step, corrected by what was measured."""

from collections.abc import Sequence

from lowres_ft import speed
from lowres_ft.plan import Plan
from lowres_ft.simulate import Account
from lowres_ft.spec import Spec
from lowres_ft.speed import Rates, Share

Shape = tuple[int, int]
"""Sequences of a micro-batch, and the tokens of each, padding counted."""


class Pace(Spec):
    """Seconds of what a run does."""

    start: float
    """Of a micro-batch, however small: starting its operations."""
    token: float
    """Of each token, padding counted."""
    pair: float
    """Of each token for each token of its row: attention."""
    link: float
    """That layers take to come for a micro-batch where they pass; they do so while others compute."""
    update: float
    """Of the optimizer's step."""
    evaluation: float
    """Of a batch of evaluation, for each second of training on a micro-batch of its size."""
    measured: tuple[tuple[float, float], ...] = ()
    """Tokens of micro-batches that were timed, fewest first, and what they took for each second that was told."""

    def seconds(self, shape: Shape) -> float:
        """Of a micro-batch of training, forward and backward."""
        rows, width = shape
        told = self.start + rows * width * (self.token + self.pair * width)
        return max(told, self.link) * self._correction(rows * width)

    def of_evaluation(self, shape: Shape) -> float:
        """Of a batch of evaluation."""
        return self.evaluation * self.seconds(shape)

    def corrected(self, timed: Sequence[tuple[Sequence[Shape], float]]) -> "Pace":
        """The pace after steps of some micro-batches were timed."""
        told = self.model_copy(update={"measured": ()})
        found = []
        for shapes, seconds in timed:
            tokens = sum(rows * width for rows, width in shapes) / len(shapes)
            found.append((tokens, seconds / sum(map(told.seconds, shapes))))
        return self.model_copy(update={"measured": tuple(sorted(found))})

    def _correction(self, tokens: float) -> float:
        """Between two that were timed, in proportion to the tokens; beyond them, that of the nearer one."""
        if not self.measured:
            return 1.0
        (few, first), (many, last) = self.measured[0], self.measured[-1]
        place = 0.0 if many == few else min(1.0, max(0.0, (tokens - few) / (many - few)))
        return first + place * (last - first)


UNKNOWN = Pace(start=0.0, token=1.0, pair=0.0, link=0.0, update=0.0, evaluation=0.4)
"""Of a base of which nothing is told: in proportion to tokens, once corrected. A forward pass is a third, and sampling
and transfers come on top."""


def told(long: Account, typical: Account, plan: Plan, rates: Rates, trained: int, share: Share) -> Pace:
    """What accounts of a long and of a typical micro-batch, and `trained` parameters, come to at a share of rates."""
    accounts = (long, typical)
    starts = [speed.starts(one.training, share) for one in accounts]
    each = [
        (speed.seconds(one.training, plan.dtype, rates, share) - start) / (one.rows * one.width)
        for one, start in zip(accounts, starts, strict=True)
    ]
    pair = 0.0 if long.width == typical.width else (each[0] - each[1]) / (long.width - typical.width)
    pair = min(max(0.0, pair), each[1] / typical.width)
    training = Pace(
        start=starts[1],
        token=each[1] - pair * typical.width,
        pair=pair,
        link=speed.passing(long.held.passing, rates),
        update=(16 * trained + 2 * long.held.optimizer) / rates.bandwidth,
        evaluation=1.0,
    )
    of_evaluation = speed.seconds(long.evaluation, plan.dtype, rates, share)
    return training.model_copy(update={"evaluation": of_evaluation / training.seconds((2 * long.rows, long.width))})
