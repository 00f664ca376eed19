"""Labels that follow from something shallow: a single word, or the length of the text."""

import warnings
from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import Field

from lowres_ft.checks._survey import Part, Survey, texts
from lowres_ft.checks.base import Check, Finding
from lowres_ft.tasks._tfidf import WORD

_FOLDS = 5
_WORDS = 50_000  # most frequent ones that are looked at


class Shortcuts(Check):
    """Labels that follow from something shallow: a single word, or the length of the text."""

    kind: Literal["shortcuts"] = "shortcuts"
    sample: int = Field(default=20_000, ge=1)
    """Training rows that are looked at, at the most."""
    recall: float = Field(default=0.9, gt=0, le=1)
    """Share of a label's rows that hold a word from which that word gives the label away."""
    precision: float = Field(default=0.95, gt=0, le=1)
    """Share of a word's rows that have the label from which that word gives the label away."""
    balanced_accuracy: float = Field(default=0.9, gt=0, le=1)
    """Balanced accuracy of a tree that knows lengths alone, out of fold, from which lengths give labels away."""
    rows_of_label: int = Field(default=10, ge=_FOLDS)
    """Rows of a label from which it is looked at."""
    costly = True

    def find(self, survey: Survey) -> Iterator[Finding]:
        if not survey.has_classes:
            return
        part = survey.train
        positions = part.sample(survey.most or self.sample)
        labels = [part.rows.labels[row] for row in positions]
        has = np.zeros((len(positions), len(part.task.names)), dtype=bool)  # (rows, classes)
        for row, own in enumerate(labels):
            has[row, [part.task.class_of(label) for label in own]] = True
        yield from self._words(part, positions, has)
        if (has.sum(1) == 1).all():
            yield from self._lengths(part, positions, has)

    def _words(self, part: Part, positions: np.ndarray, has: np.ndarray) -> Iterator[Finding]:
        from sklearn.feature_extraction.text import CountVectorizer

        said = [" ".join(texts(example)) for example in part.examples(positions)]
        words = CountVectorizer(binary=True, token_pattern=WORD, max_features=_WORDS, dtype=np.int32)
        holds = words.fit_transform(said)  # (rows, words)
        names, frequency = words.get_feature_names_out(), np.asarray(holds.sum(0)).ravel()
        for index in np.flatnonzero(has.sum(0) >= self.rows_of_label):
            both = holds.T @ has[:, index].astype(np.int32)
            recall, precision = both / has[:, index].sum(), both / frequency
            common = has[:, index].mean()
            gives = (recall >= self.recall) & (precision >= np.maximum(self.precision, (1 + common) / 2))
            if not gives.any():
                continue
            best = int(np.argmax(np.where(gives, recall * precision, 0)))
            rows = positions[np.flatnonzero(has[:, index] & (holds[:, [best]].toarray().ravel() > 0))]
            message = (
                f"the word {names[best]!r} gives the label {part.task.names[index]!r} away: it stands in "
                f"{recall[best]:.0%} of its rows, and {precision[best]:.0%} of the rows with it have the label"
            )
            hint = "Will it stand there when the label is not known yet? If not, remove it from the texts."
            yield part.finding("label_from_word", "warning", rows, message, hint, of=len(positions))

    def _lengths(self, part: Part, positions: np.ndarray, has: np.ndarray) -> Iterator[Finding]:
        from sklearn.metrics import balanced_accuracy_score
        from sklearn.model_selection import cross_val_predict
        from sklearn.tree import DecisionTreeClassifier

        classes = has.argmax(1)
        kept = np.flatnonzero(has.sum(0)[classes] >= self.rows_of_label)
        count = len(np.unique(classes[kept]))
        if count < 2:
            return
        tree = DecisionTreeClassifier(max_leaf_nodes=2 * count, class_weight="balanced", random_state=0)
        lengths = part.characters[positions[kept], None]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            guessed = cross_val_predict(tree, lengths, classes[kept], cv=_FOLDS)
            reached = float(balanced_accuracy_score(classes[kept], guessed))
        if reached >= self.balanced_accuracy:
            rows = positions[kept[guessed == classes[kept]]]
            message = f"the length of a text alone tells its label: balanced accuracy {reached:.2f}"
            hint = "Texts of the labels come from different sources, or one of them was cut: draw them alike."
            yield part.finding("label_from_length", "warning", rows, message, hint, of=len(positions))
