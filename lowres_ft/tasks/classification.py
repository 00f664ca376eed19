"""Text classification: one label for a text."""

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, field_validator

from lowres_ft.errors import DataError, nearest
from lowres_ft.tasks.base import IGNORED, Batch, Encoded, Example, Form, Ragged, Seen, Task

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_LABELS = 1000

_UNSPACED = "\u3040-\u30ff\u3400-\u9fff"
_WORD = rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]"
"""A word, a character of a script without spaces, or a sign: so that no text is without words."""


def _as_text(value: object) -> object:
    """A label written as a number or a truth value is the text of it."""
    return str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, int | float) else value


Label = Annotated[str, BeforeValidator(_as_text)]


@dataclass(frozen=True, slots=True)
class Text(Example):
    """A text and its label; None where it is to be predicted."""

    text: str
    label: str | None = None


class Classification(Task):
    """One of several labels for each text."""

    kind: Literal["classification"] = "classification"
    labels: tuple[Label, ...] | None = None
    """Names of the classes in order; null finds them in the training rows."""

    example: ClassVar[type[Example]] = Text
    model_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_type: ClassVar[str] = "SEQ_CLS"
    hub_tag: ClassVar[str] = "text-classification"

    @field_validator("labels")
    @classmethod
    def _usable(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if labels is not None and len(labels) < 2:
            raise ValueError("must name at least two classes")
        if labels is not None and not all(label.strip() for label in labels):
            raise ValueError("must not hold an empty name")
        if labels is not None and len(set(labels)) < len(labels):
            raise ValueError("must not name a class twice")
        return labels

    @property
    def metric(self) -> str:
        return "accuracy"

    @property
    def forms(self) -> tuple[Form, ...]:
        return (Form(given=("text",), wanted=("label",)),)

    @property
    def names(self) -> tuple[str, ...]:
        return self.labels or ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels, once they are known."""
        assert self.labels is not None, "labels are not resolved yet"
        return self.labels

    def model_config_fields(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.classes),
            "id2label": dict(enumerate(self.classes)),
            "label2id": {label: index for index, label in enumerate(self.classes)},
            "problem_type": "single_label_classification",
        }

    def read(self, row: Mapping[str, Any], where: str) -> Text:
        text, label = row["text"], row.get("label")
        if text is None or (isinstance(text, str) and not text.strip()):
            raise DataError(f"{where}: the text is empty")
        if not isinstance(text, str):
            raise DataError(f"{where}: the text is {_quoted(text)}, which is not text")
        if "label" not in row:
            return Text(where, text)
        if label is None or label != label or (isinstance(label, str) and not label.strip()):
            raise DataError(f"{where}: the label is empty")
        if not isinstance(label, str | int | float):
            raise DataError(f"{where}: the label is {_quoted(label)}, which is neither a word nor a number")
        return Text(where, text, str(_as_text(label)))

    def labels_in(self, example: Text) -> Collection[str]:
        return () if example.label is None else (example.label,)

    def resolve(self, seen: Mapping[str, Seen]) -> Self:
        if len(seen) > MOST_LABELS:
            raise DataError(
                f"more than {MOST_LABELS:,} different labels, such as {_quoted(next(iter(seen)))}",
                hint="Is this the label column? Map it with data.columns.label=NAME.",
            )
        task = self if self.labels else self.model_copy(update={"labels": _found(seen)})
        task.check(seen)
        present = {task.class_of(label) for label in seen}
        if len(present) < 2:
            only = next(iter(seen.values()))
            raise DataError(
                f"every row has the label {_quoted(next(iter(seen)))} (first {only.where}); "
                "a classifier needs two classes",
                hint="Add rows of another class.",
            )
        if missing := [label for index, label in enumerate(task.classes) if index not in present]:
            raise DataError(
                f"task.labels names {', '.join(map(repr, missing))}, which no training row has",
                hint=f"Found are {_listed(seen)}. Correct task.labels, or leave it out to find them.",
            )
        return task

    def check(self, seen: Mapping[str, Seen]) -> None:
        """Raise a DataError that lists the labels that are none of the task's, with file and line."""
        unknown = [(label, at) for label, at in seen.items() if not self._known(label)]
        if not unknown:
            return
        lines = [
            f"{at.where}: unknown label {_quoted(label)}{nearest(label, self.classes)}, "
            f"{at.count} row{'s' * (at.count > 1)}"
            for label, at in unknown[:10]
        ]
        more = f"\n  and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        numbers = any(_is_number(label) for label, _ in unknown) and not any(map(_is_number, self.classes))
        raise DataError(
            "\n  ".join(lines) + more,
            hint=f"task.labels names {_listed(self.classes)}"
            + (f", for which the numbers 0 to {len(self.classes) - 1} may stand, in this order" * numbers)
            + ". Correct the rows, list the labels there, or use task.labels=null to find them.",
        )

    def _known(self, label: str) -> bool:
        try:
            self.class_of(label)
        except KeyError:
            return False
        return True

    def class_of(self, label: str) -> int:
        """Exact names first; whole numbers from 0 are indices only where no name is a number."""
        if label in self.classes:
            return self.classes.index(label)
        if any(_is_number(name) for name in self.classes):
            raise KeyError(label)
        if label.isascii() and label.isdigit() and len(label) < 10 and str(int(label)) == label:
            index = int(label)
            if index < len(self.classes):
                return index
        raise KeyError(label)

    def encode(self, tokenizer: "PreTrainedTokenizerBase", examples: Sequence[Text]) -> list[list[Encoded]]:
        texts = [example.text for example in examples]
        ids = tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        empty = [tokenizer.pad_token_id]
        return [
            [Encoded(list(tokens) or empty, [0 if example.label is None else self.class_of(example.label)])]
            for tokens, example in zip(ids, examples, strict=True)
        ]

    def loss(self, model: "PreTrainedModel", batch: Batch) -> "Tensor":
        from torch.nn.functional import cross_entropy

        return cross_entropy(self.logits(model, batch), batch.targets[:, 0], ignore_index=IGNORED, reduction="sum")

    def outputs(self, model: "PreTrainedModel", batch: Batch) -> "Tensor":
        return self.logits(model, batch)[:, None]

    def logits(self, model: "PreTrainedModel", batch: Batch) -> "Tensor":
        logits: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask).logits
        return logits.float()

    def evidence(self, truth: Ragged, outputs: Ragged) -> "np.ndarray":
        """(R, 3): the true class, the predicted one, and the log-probability of the true one."""
        import numpy as np

        targets, scores = truth.values, outputs.values
        log_probability = _log_softmax(scores)[np.arange(len(targets)), targets]
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
        confusion = self._confusion(evidence)
        columns = dict(zip(("precision", "recall", "f1", "support"), _by_class(confusion), strict=True))
        classes = {
            label: {name: column[index].item() for name, column in columns.items()}
            for index, label in enumerate(self.classes)
        }
        return {"classes": classes, "confusion": confusion.tolist()}

    def _confusion(self, evidence: "np.ndarray") -> "np.ndarray":
        """(C, C) counts: a row for each true class, a column for each predicted one."""
        import numpy as np

        size = len(self.classes)
        cells = (evidence[:, 0] * size + evidence[:, 1]).astype(np.int64)
        return np.bincount(cells, minlength=size * size).reshape(size, size)

    def baselines(self, train: Iterable[Text], test: Iterable[Text], seed: int) -> dict[str, Ragged]:
        """Log-probabilities of the classes' shares, and of TF-IDF with logistic regression."""
        import numpy as np
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        rows = list(itertools.islice(train, self.baseline_rows))
        targets = np.array([self.class_of(row.label or "") for row in rows])
        texts = [row.text for row in test]
        # One count is added to each class, so that a class that none of these rows has keeps a finite log loss.
        shares = (np.bincount(targets, minlength=len(self.classes)) + 1) / (len(rows) + len(self.classes))
        words = TfidfVectorizer(sublinear_tf=True, token_pattern=_WORD)
        tfidf = make_pipeline(words, LogisticRegression(C=4.0, max_iter=1000, random_state=seed))
        tfidf.fit([row.text for row in rows], targets)
        outputs = np.full((len(texts), len(self.classes)), np.log(1e-9))
        outputs[:, tfidf[-1].classes_] = np.log(np.maximum(tfidf.predict_proba(texts), 1e-9))
        found = {"majority": np.tile(np.log(shares), (len(texts), 1)), "tfidf": outputs}
        return {name: Ragged(values, np.arange(len(texts) + 1)) for name, values in found.items()}

    def prediction(self, example: Text, output: "np.ndarray") -> dict[str, Any]:
        import numpy as np

        scores = np.exp(_log_softmax(output)[0])
        by_label = {label: float(score) for label, score in zip(self.classes, scores, strict=True)}
        return {"text": example.text, "label": self.classes[int(output.argmax())], "scores": by_label}


def _is_number(label: str) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False


def _found(seen: Mapping[str, Seen]) -> tuple[str, ...]:
    """The labels of the rows: by value where all are numbers, else by alphabet.

    Raises:
        DataError: Two differ only in spaces, capitals or the form of a number, and so are hardly two classes.
    """
    spelled: dict[str | float, str] = {}
    for label, at in seen.items():
        other = spelled.setdefault(float(label) if _is_number(label) else label.strip().casefold(), label)
        if other != label:
            raise DataError(
                f"{at.where}: the label {_quoted(label)} differs from {_quoted(other)} ({seen[other].where}) only in "
                "how it is written",
                hint="Write them alike; or list both in task.labels, if they are two classes.",
            )
    if all(_is_number(label) for label in seen):
        return tuple(sorted(seen, key=lambda label: (float(label), label)))
    return tuple(sorted(seen))


def _quoted(value: object, most: int = 60) -> str:
    """A value as it is told: a label column that is not one may hold whole pages."""
    shown = repr(value)
    return shown if len(shown) <= most else f"{shown[:most]}..."


def _listed(labels: Collection[str], most: int = 10) -> str:
    words = [_quoted(label) for label in itertools.islice(labels, most)]
    return ", ".join(words) + (f" and {len(labels) - most} more" if len(labels) > most else "")


def _by_class(confusion: "np.ndarray") -> "tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]":
    """Precision, recall, F1 and support of each class, (C,) each."""
    import numpy as np

    hits, support, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    precision = hits / np.maximum(predicted, 1)
    recall = hits / np.maximum(support, 1)
    return precision, recall, 2 * hits / np.maximum(support + predicted, 1), support


def _log_softmax(outputs: "np.ndarray") -> "np.ndarray":
    import numpy as np

    shifted = outputs.astype(np.float64) - outputs.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))
