"""Any number of labels for each text: the loss, the scores, the thresholds and the baselines."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lowres_ft.tasks import _tfidf
from lowres_ft.tasks.base import IGNORED, NONE, Ragged

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

ALL_BUT_ONE = 1 - 1e-12
"""Above it, so few probabilities can be told apart that thresholds there would not decide as they should."""
HALF = 0.5
"""The probability from which a label is given, where nothing else was chosen."""


@dataclass(frozen=True)
class Multi:
    """What is done with the labels of a task that gives each text those that fit; an item is a text x a label."""

    labels: tuple[str, ...]
    weights: tuple[float, ...] | None
    smoothing: float
    thresholds: tuple[float, ...]
    temperature: float = 1.0

    metric: ClassVar[str] = "f1_micro"
    problem_type: ClassVar[str] = "multi_label_classification"

    def targets(self, classes: Collection[int]) -> list[int]:
        """(L,) 1 for each label that the text has, else 0."""
        return [int(index in classes) for index in range(len(self.labels))]

    def counted(self, targets: "np.ndarray") -> float:
        """The sum of the items' weights: a label's weight where it is given, else 1."""
        import numpy as np

        if self.weights is None:
            return float((targets != IGNORED).sum())
        rows = targets.reshape(-1, len(self.labels))
        return float(np.where(rows == 1, np.array(self.weights), rows != IGNORED).sum())

    def loss(self, logits: "Tensor", targets: "Tensor") -> "Tensor":
        """Binary cross-entropy of each item times its weight, summed; logits and targets (B, L)."""
        import torch
        from torch.nn.functional import binary_cross_entropy_with_logits

        weights = (targets != IGNORED).to(logits.dtype)
        if self.weights is not None:
            weights = torch.where(targets == 1, logits.new_tensor(self.weights), weights)
        wanted = targets.clamp(min=0).to(logits.dtype) * (1 - self.smoothing) + self.smoothing / 2
        return binary_cross_entropy_with_logits(logits, wanted, weight=weights, reduction="sum")

    def outputs(self, logits: "Tensor") -> "Tensor":
        """(B, L, 1): each label's logit is an item of its own."""
        return logits[..., None]

    def choice(self, logits: "np.ndarray") -> "np.ndarray":
        """(R, L) whether each label is given."""
        import numpy as np

        return np.asarray(self._probability(logits) >= np.array(self.thresholds))

    def evidence(self, truth: Ragged, outputs: Ragged) -> "np.ndarray":
        """(R, 2, L): whether a row has each label, and whether it is predicted."""
        import numpy as np

        shape = (len(truth), len(self.labels))
        return np.stack([truth.values.reshape(shape) == 1, self.choice(outputs.values.reshape(shape))], axis=1)

    def metrics(self, evidence: "np.ndarray") -> dict[str, float]:
        """Macro averages are over all labels; a ratio without cases is 0, as in scikit-learn."""
        import numpy as np

        counts = _counts(evidence)
        micro = [float(value) for value in _ratios(counts.sum(1))]
        macro = [float(value.mean()) for value in _ratios(counts)]
        return {
            "f1_micro": micro[2],
            "f1_macro": macro[2],
            "subset_accuracy": float(np.mean((evidence[:, 0] == evidence[:, 1]).all(1))),
            "precision_micro": micro[0],
            "recall_micro": micro[1],
            "precision_macro": macro[0],
            "recall_macro": macro[1],
        }

    def details(self, evidence: "np.ndarray") -> dict[str, Any]:
        """Scores by label, and the probability from which it is given."""
        counts = _counts(evidence)
        columns = [*_ratios(counts), counts[1]]
        names = ("precision", "recall", "f1", "support")
        return {
            "classes": {
                label: {name: column[index].item() for name, column in zip(names, columns, strict=True)}
                | {"threshold": self.thresholds[index]}
                for index, label in enumerate(self.labels)
            }
        }

    def certainty(self, truth: Ragged, outputs: Ragged) -> "np.ndarray":
        """(R x L, 3) of each label of each row, as in `Task.certainty`: right is that the row has it."""
        import numpy as np

        has, logits = truth.values == 1, outputs.values[:, 0] / self.temperature
        sign = np.where(has, -1.0, 1.0)
        return np.stack([self._probability(outputs.values[:, 0]), has, -np.logaddexp(0, sign * logits)], axis=1)

    def ranking(self, truth: Ragged, outputs: Ragged) -> "dict[str, np.ndarray]":
        """Worst is the least probability of a row's labels all being as they are; in doubt, one near its threshold."""
        import numpy as np

        shape = (len(truth), len(self.labels))
        scores = self._probability(outputs.values.reshape(shape))
        return {
            "worst": -self.certainty(truth, outputs)[:, 2].reshape(shape).sum(1),
            "uncertain": -np.abs(scores - np.array(self.thresholds)).min(1),
        }

    def wanted(self, truth: "np.ndarray") -> str:
        """A row's labels in words."""
        return ", ".join(label for label, has in zip(self.labels, truth == 1, strict=True) if has) or NONE

    def tuned(self, truth: Ragged, outputs: Ragged) -> dict[str, float]:
        """For each label the probability from which giving it has the best F1 on these rows.

        It is chosen among the model's own probabilities and then scaled, so that a temperature changes no answer.
        """
        shape = (len(truth), len(self.labels))
        has, scores = truth.values.reshape(shape) == 1, _expit(outputs.values.reshape(shape))
        best = [_best(has[:, index], scores[:, index]) for index in range(len(self.labels))]
        return {label: scaled(value, self.temperature) for label, value in zip(self.labels, best, strict=True)}

    def baselines(
        self, train: Sequence[_tfidf.Texts], targets: "np.ndarray", test: Sequence[_tfidf.Texts], seed: int
    ) -> "dict[str, np.ndarray]":
        """(N x L, 1) logits of the labels' shares, and of TF-IDF with a logistic regression for each label.

        They are moved and scaled so that the task's thresholds and temperature, which were chosen for the model, decide
        as one half would.
        """
        import numpy as np
        from scipy.special import logit

        shares = (targets.sum(0) + 1) / (len(train) + 2)
        outputs = np.tile(logit(shares), (len(test), 1))
        found = {"majority": outputs, "tfidf": outputs.copy()}
        seen, unseen = _tfidf.features(train, test)
        for index in np.flatnonzero((targets.min(0) == 0) & (targets.max(0) == 1)):
            model = _tfidf.regression(seed).fit(seen, targets[:, index])
            found["tfidf"][:, index] = model.decision_function(unseen)
        moved = logit(np.array(self.thresholds))
        return {name: ((values + moved) * self.temperature).reshape(-1, 1) for name, values in found.items()}

    def answer(self, output: "np.ndarray") -> dict[str, Any]:
        """The labels that are given, likeliest first, and the probabilities of all."""
        scores = self._probability(output[:, 0])
        given = [int(index) for index in (-scores).argsort(kind="stable") if self.choice(output[:, 0])[index]]
        by_label = {label: float(score) for label, score in zip(self.labels, scores, strict=True)}
        return {"labels": [self.labels[index] for index in given], "scores": by_label}

    def _probability(self, logits: "np.ndarray") -> "np.ndarray":
        return _expit(logits / self.temperature)


def scaled(threshold: float, temperature: float) -> float:
    """The threshold that decides on probabilities at a temperature as `threshold` does on the model's own."""
    import numpy as np
    from scipy.special import expit, logit

    found = float(expit(logit(threshold) / temperature))
    return min(max(found, float(np.finfo(np.float64).tiny)), float(np.nextafter(1.0, 0.0)))


def _counts(evidence: "np.ndarray") -> "np.ndarray":
    """(3, L) hits, rows that have each label, and rows for which it is predicted."""
    import numpy as np

    has, predicted = evidence[:, 0], evidence[:, 1]
    return np.stack([(has & predicted).sum(0), has.sum(0), predicted.sum(0)])


def _ratios(counts: "np.ndarray") -> "tuple[np.ndarray, np.ndarray, np.ndarray]":
    """Precision, recall and F1 of (3, ...) counts."""
    import numpy as np

    hits, support, predicted = counts
    return hits / np.maximum(predicted, 1), hits / np.maximum(support, 1), 2 * hits / np.maximum(support + predicted, 1)


def _best(has: "np.ndarray", scores: "np.ndarray") -> float:
    """The threshold with the best F1, half-way between two scores; of equals the one that is nearest to one half."""
    import numpy as np

    if not has.any():
        return HALF
    levels = np.unique(scores)
    tried = np.append((levels + np.append(0, levels[:-1])) / 2, HALF)
    tried = tried[(tried > 0) & (tried < 1)]
    ordered, positive = np.sort(scores), np.sort(scores[has])
    predicted = len(ordered) - np.searchsorted(ordered, tried)
    hits = len(positive) - np.searchsorted(positive, tried)
    f1 = 2 * hits / (predicted + len(positive))
    return float(min(tried[f1 == f1.max()], key=lambda threshold: (abs(threshold - HALF), threshold)))


def _expit(logits: "np.ndarray") -> "np.ndarray":
    import numpy as np
    from scipy.special import expit

    return np.asarray(expit(logits.astype(np.float64)))
