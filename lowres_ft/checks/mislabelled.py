"""Labels that are probably wrong, by confident learning (Northcutt et al. 2021, doi:10.1613/jair.1.12125)."""

import warnings
from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import Field

from lowres_ft.checks._survey import Part, Survey, shown, texts
from lowres_ft.checks.base import Check, Finding

_FOLDS = 5
_SEED = 7
_NAMED = 3  # rows that a message quotes


class Mislabelled(Check):
    """Labels that are probably wrong, by the out-of-fold probabilities of TF-IDF with logistic regression."""

    kind: Literal["mislabelled"] = "mislabelled"
    sample: int = Field(default=10_000, ge=1)
    """Training rows that are looked at, at the most."""
    doubtful: float = Field(default=0.05, gt=0, lt=1)
    """Probability of the given label, at the most, of a row that is told."""
    rows_of_label: int = Field(default=2 * _FOLDS, ge=_FOLDS)
    """Rows of a label from which it is looked at."""
    able: float = Field(default=0.6, gt=0, lt=1)
    """Out-of-fold accuracy below which the simple model knows too little to doubt a label."""
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
        """Places of the rows that cleanlab prunes by both of its rules, and whose label is doubtful; worst first."""
        from cleanlab.filter import find_label_issues

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = find_label_issues(
                given, probabilities, return_indices_ranked_by="self_confidence", filter_by="both", n_jobs=1
            )
        return np.array([row for row in found if probabilities[row, given[row]] <= self.doubtful], dtype=np.int64)

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
        found = part.finding(
            "label_errors", "warning", positions[suspects], message, hint, of=len(positions), ranked=True
        )
        return found.model_copy(update={"sampled": len(positions) < len(part)})


def _out_of_fold(part: Part, positions: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """(N, C) probabilities of each row's classes by a baseline that did not see it, nor a text equal to it."""
    from scipy.special import softmax
    from sklearn.model_selection import StratifiedGroupKFold

    examples = list(part.examples(positions))
    found = np.zeros((len(positions), len(part.task.names)))
    folds = StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=_SEED)
    for seen, unseen in folds.split(positions, classes, part.keys[positions]):
        train, test = ([examples[row] for row in rows] for rows in (seen, unseen))
        outputs = part.task.baselines(train, test, _SEED)["tfidf"].values
        found[unseen] = softmax(outputs.reshape(len(test), -1), axis=1)
    return found
