"""One label for each text: the loss, the scores and the baselines."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lowres_ft.tasks import _tfidf
from lowres_ft.tasks.base import IGNORED, Ragged

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class Single:
    """What is done with the classes of a task that gives each text one of them."""

    labels: tuple[str, ...]
    weights: tuple[float, ...] | None
    smoothing: float
    temperature: float = 1.0

    metric: ClassVar[str] = "accuracy"
    problem_type: ClassVar[str] = "single_label_classification"

    def targets(self, classes: Collection[int]) -> list[int]:
        """One target, the class; 0 where it is to be predicted."""
        return list(classes) or [0]

    def counted(self, targets: "np.ndarray") -> float:
        """The sum of the weights of the targets' classes; without weights, their number."""
        import numpy as np

        items = targets[targets != IGNORED]
        return float(len(items) if self.weights is None else np.array(self.weights)[items].sum())

    def loss(self, logits: "Tensor", targets: "Tensor") -> "Tensor":
        """Cross-entropy as torch defines it with weights and smoothing, summed; logits (B, L), targets (B, 1)."""
        from torch.nn.functional import cross_entropy

        weights = None if self.weights is None else logits.new_tensor(self.weights)
        return cross_entropy(
            logits,
            targets[:, 0],
            weight=weights,
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=self.smoothing,
        )

    def outputs(self, logits: "Tensor") -> "Tensor":
        """(B, 1, L): one item, of which all logits are kept."""
        return logits[:, None]

    def choice(self, logits: "np.ndarray") -> "np.ndarray":
        """(R,) the likeliest class."""
        chosen: np.ndarray = logits.argmax(-1)
        return chosen

    def evidence(self, truth: Ragged, outputs: Ragged) -> "np.ndarray":
        """(R, 3): the true class, the predicted one, and the log-probability of the true one."""
        import numpy as np

        targets, scores = truth.values, outputs.values
        log_probability = log_softmax(scores / self.temperature)[np.arange(len(targets)), targets]
        return np.stack([targets, scores.argmax(1), log_probability], axis=1)

    def metrics(self, evidence: "np.ndarray") -> dict[str, float]:
        """Macro averages are over all labels; a ratio without cases is 0, as in scikit-learn."""
        confusion = self._confusion(evidence)
        precision, recall, f1, support = _by_class(confusion)
        return {
            "accuracy": float(confusion.trace() / len(evidence)),
            "f1_macro": float(f1.mean()),
            "precision_macro": float(precision.mean()),
            "recall_macro": float(recall.mean()),
            "f1_weighted": float((f1 * support).sum() / support.sum()),
            "log_loss": float(-evidence[:, 2].mean()),
        }

    def details(self, evidence: "np.ndarray") -> dict[str, Any]:
        """Scores by class, and the confusion: a row for each true class."""
        confusion = self._confusion(evidence)
        columns = dict(zip(("precision", "recall", "f1", "support"), _by_class(confusion), strict=True))
        classes = {
            label: {name: column[index].item() for name, column in columns.items()}
            for index, label in enumerate(self.labels)
        }
        return {"classes": classes, "confusion": confusion.tolist()}

    def certainty(self, truth: Ragged, outputs: Ragged) -> "np.ndarray":
        """(R, 3) of each row's answer, as in `Task.certainty`."""
        return certainty(truth.values, outputs.values / self.temperature)

    def ranking(self, truth: Ragged, outputs: Ragged) -> "dict[str, np.ndarray]":
        """Worst is the least probability of the true class; in doubt are those whose first two classes are close."""
        import numpy as np

        scores = log_softmax(outputs.values / self.temperature)
        second, first = np.moveaxis(np.partition(np.exp(scores), -2, axis=1)[:, -2:], -1, 0)
        return {"worst": -scores[np.arange(len(scores)), truth.values], "uncertain": second - first}

    def wanted(self, truth: "np.ndarray") -> str:
        """A row's class in words."""
        return self.labels[int(truth[0])]

    def _confusion(self, evidence: "np.ndarray") -> "np.ndarray":
        """(C, C) counts: a row for each true class, a column for each predicted one."""
        import numpy as np

        size = len(self.labels)
        cells = (evidence[:, 0] * size + evidence[:, 1]).astype(np.int64)
        return np.bincount(cells, minlength=size * size).reshape(size, size)

    def baselines(
        self, train: Sequence[_tfidf.Texts], targets: "np.ndarray", test: Sequence[_tfidf.Texts], seed: int
    ) -> "dict[str, np.ndarray]":
        """(N, C) log-probabilities of the classes' shares, and of TF-IDF with logistic regression.

        They are scaled, so that the task's temperature, which was chosen for the model, leaves them as they are.
        """
        import numpy as np

        targets, size = targets[:, 0], len(self.labels)
        # One count is added to each class, so that a class that none of these rows has keeps a finite log loss.
        shares = (np.bincount(targets, minlength=size) + 1) / (len(train) + size)
        seen, unseen = _tfidf.features(train, test)
        model = _tfidf.regression(seed).fit(seen, targets)
        outputs = np.full((len(test), size), np.log(1e-9))
        outputs[:, model.classes_] = np.log(np.maximum(model.predict_proba(unseen), 1e-9))
        found = {"majority": np.tile(np.log(shares), (len(test), 1)), "tfidf": outputs}
        return {name: values * self.temperature for name, values in found.items()}

    def answer(self, output: "np.ndarray") -> dict[str, Any]:
        """The likeliest label, and the probabilities of all."""
        import numpy as np

        scores = np.exp(log_softmax(output / self.temperature)[0])
        by_label = {label: float(score) for label, score in zip(self.labels, scores, strict=True)}
        return {"label": self.labels[int(output.argmax())], "scores": by_label}


def _by_class(confusion: "np.ndarray") -> "tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]":
    """Precision, recall, F1 and support of each class, (C,) each."""
    import numpy as np

    hits, support, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    precision = hits / np.maximum(predicted, 1)
    recall = hits / np.maximum(support, 1)
    return precision, recall, 2 * hits / np.maximum(support + predicted, 1), support


def certainty(targets: "np.ndarray", logits: "np.ndarray") -> "np.ndarray":
    """(N, 3) of each item: its likeliest class's probability, 1 where that is right, and the truth's log-probability.

    Args:
        targets: (N,) classes.
        logits: (N, C).
    """
    import numpy as np

    scores = log_softmax(logits)
    right = logits.argmax(1) == targets
    return np.stack([np.exp(scores.max(1)), right, scores[np.arange(len(targets)), targets]], axis=1)


def log_softmax(outputs: "np.ndarray") -> "np.ndarray":
    """(N, C) log-probabilities of logits."""
    import numpy as np

    shifted = outputs.astype(np.float64) - outputs.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))
