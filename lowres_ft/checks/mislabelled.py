"""Labels that are probably wrong, by confident learning (Northcutt et al. 2021, doi:10.1613/jair.1.12125)."""

import warnings
from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import Field

from lowres_ft.checks._survey import Part, Survey, shown, texts
from lowres_ft.checks.base import Check, Finding
from lowres_ft.tasks import _tfidf

_FOLDS = 5
_SEED = 7
_NAMED = 3  # rows that a message quotes


class Mislabelled(Check):
    """Labels that are probably wrong, by the out-of-fold probabilities of TF-IDF with logistic regression."""

    kind: Literal["mislabelled"] = "mislabelled"
    sample: int = Field(default=10_000, ge=1)
    """Training rows that are looked at, at the most."""
    sure: float = Field(default=0.5, gt=0, lt=1)
    """A row is told whose other label is as probable as it is for this share of the rows that have it."""
    rows_of_label: int = Field(default=2 * _FOLDS, ge=_FOLDS)
    """Rows of a label from which it is looked at."""
    able: float = Field(default=0.9, gt=0, lt=1)
    """Out-of-fold accuracy below which the simple model knows too little to doubt a label."""
    warn_from: float = Field(default=0.01, gt=0, le=1)
    """Share of the rows from which suspects are a warning; below, they are an info."""
    costly = True

    def find(self, survey: Survey) -> Iterator[Finding]:
        part = survey.train
        if not survey.has_classes or max(map(len, set(part.rows.labels))) > 1:
            return  # of several labels a row, those that are missing are the usual fault, and no model can tell them
        positions = part.sample(survey.most or self.sample)
        classes = np.array([part.task.class_of(part.rows.labels[row][0]) for row in positions])
        counts = np.bincount(classes, minlength=len(part.task.names))
        kept = np.flatnonzero(counts >= self.rows_of_label)
        if len(kept) < 2:
            return
        if len(np.unique(part.keys[positions])) < self.rows_of_label * len(kept):
            return
        positions, classes = positions[np.isin(classes, kept)], classes[np.isin(classes, kept)]
        probabilities = _out_of_fold(part, positions, classes)[:, kept]
        probabilities /= probabilities.sum(1, keepdims=True)
        given = np.searchsorted(kept, classes)
        if (probabilities.argmax(1) == given).mean() < self.able:
            return
        suspects = self._suspects(given, probabilities)
        if len(suspects):
            yield self._told(part, positions, suspects, given, probabilities, kept)

    def _suspects(self, given: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
        """Places of the rows that cleanlab prunes by both of its rules, and whose other label is sure; worst first."""
        from cleanlab.filter import find_label_issues

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = find_label_issues(
                given, probabilities, return_indices_ranked_by="self_confidence", filter_by="both", n_jobs=1
            )
        # (C,) how probable each label is for the rows that have it.
        usual = np.array(
            [np.quantile(probabilities[given == index, index], self.sure) for index in range(probabilities.shape[1])]
        )
        other = probabilities[found].argmax(1)
        doubted = (other != given[found]) & (probabilities[found, other] >= usual[other])
        suspects: np.ndarray = found[doubted]
        return suspects

    def _told(
        self,
        part: Part,
        positions: np.ndarray,
        suspects: np.ndarray,
        given: np.ndarray,
        probabilities: np.ndarray,
        kept: np.ndarray,
    ) -> Finding:
        worst = suspects[:_NAMED]
        told = []
        for row, example in zip(worst, part.examples(positions[worst]), strict=True):
            names = [part.task.names[kept[index]] for index in (given[row], probabilities[row].argmax())]
            told.append(f"{shown(' '.join(texts(example)))} is {names[0]!r}, not {names[1]!r}?")
        message = f"labels may be wrong: {' '.join(told)}"
        hint = "Read them, worst first: a simple model that did not see a row is almost sure of another label."
        severity: Literal["warning", "info"] = "warning" if len(suspects) >= self.warn_from * len(given) else "info"
        found = part.finding(
            "label_errors", severity, positions[suspects], message, hint, of=len(positions), ranked=True
        )
        return found.model_copy(update={"sampled": len(positions) < len(part)})


def _out_of_fold(part: Part, positions: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """(N, C) probabilities of each row's classes by a model that did not see it, nor a text equal to it."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    examples = list(part.examples(positions))
    words, _ = _tfidf.features(examples, examples[:1])  # of all rows: how rare a word is tells no label
    # One label against the others, each by liblinear: a tenth of the time of the baseline's solver.
    model = OneVsRestClassifier(LogisticRegression(C=_tfidf.INVERSE_PENALTY, solver="liblinear", random_state=_SEED))
    found = np.zeros((len(positions), len(part.task.names)))
    _, text = np.unique(part.keys[positions], return_inverse=True)
    fold = (np.random.default_rng(_SEED).permutation(int(text.max()) + 1) % _FOLDS)[text]
    for seen, unseen in ((np.flatnonzero(fold != one), np.flatnonzero(fold == one)) for one in range(_FOLDS)):
        known = np.unique(classes[seen])
        if len(known) == 1:  # all texts of the others are in this fold: nothing tells them apart
            found[unseen, known] = 1.0
        else:
            found[np.ix_(unseen, known)] = model.fit(words[seen], classes[seen]).predict_proba(words[unseen])
    return found
