"""Scores, held to scikit-learn's; their intervals and differences, held to what is known of them."""

import warnings

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn

from lowres_ft import evaluate
from lowres_ft.evaluate import Scores, Value
from lowres_ft.tasks.base import Ragged
from lowres_ft.tasks.classification import Classification

TASK = Classification(labels=("bad", "good"))
PROPERTY = settings(max_examples=50, deadline=None)


def task_of(classes: int) -> Classification:
    return Classification(labels=tuple(f"class {index}" for index in range(classes)))


def sample(seed: int, rows: int, classes: int, present: int) -> tuple[np.ndarray, np.ndarray]:
    """Targets of the first `present` classes, and outputs that are right more often than by chance."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, present, rows)
    outputs = random.normal(size=(rows, classes)).astype(np.float32)
    outputs[np.arange(rows), truth] += 1
    return truth, outputs


def rows_of(values: np.ndarray) -> Ragged:
    """One item in each row."""
    return Ragged(values, np.arange(len(values) + 1))


def score(task: Classification, truth: np.ndarray, outputs: np.ndarray) -> Scores:
    return evaluate.score(task, rows_of(truth), rows_of(outputs))


def difference(task: Classification, truth: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> Value:
    return evaluate.difference(task, *map(rows_of, (truth, ours, theirs)))


def evidence(task: Classification, truth: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    return task.evidence(rows_of(truth), rows_of(outputs))


def outputs_of(predicted: list[int], classes: int = 2) -> np.ndarray:
    return np.eye(classes)[predicted] * 4


CASES = {
    "seed": st.integers(0, 2**31),
    "rows": st.integers(1, 60),
    "classes": st.integers(2, 6),
    "present": st.integers(1, 6),
}


@PROPERTY
@given(**CASES)
def test_metrics_are_scikit_learns(seed: int, rows: int, classes: int, present: int):
    assume(present <= classes)
    truth, outputs = sample(seed, rows, classes, present)
    predicted, every = outputs.argmax(1), list(range(classes))
    probability = np.exp(outputs.astype(np.float64))
    probability /= probability.sum(1, keepdims=True)
    averaged = {
        f"{name}_{average}": getattr(sklearn, f"{name}_score")(
            truth, predicted, labels=every, average=average, zero_division=0
        )
        for name, average in [("f1", "macro"), ("precision", "macro"), ("recall", "macro"), ("f1", "weighted")]
    }
    assert task_of(classes).metrics(evidence(task_of(classes), truth, outputs)) == pytest.approx(
        averaged
        | {
            "accuracy": sklearn.accuracy_score(truth, predicted),
            "log_loss": sklearn.log_loss(truth, probability, labels=every),
        }
    )


@PROPERTY
@given(**CASES)
def test_the_details_by_class_are_scikit_learns(seed: int, rows: int, classes: int, present: int):
    assume(present <= classes)
    truth, outputs = sample(seed, rows, classes, present)
    details = task_of(classes).details(evidence(task_of(classes), truth, outputs))
    every = list(range(classes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single class in both
        confusion = sklearn.confusion_matrix(truth, outputs.argmax(1), labels=every)
    columns = sklearn.precision_recall_fscore_support(truth, outputs.argmax(1), labels=every, zero_division=0)
    assert details["confusion"] == confusion.tolist()
    assert list(details["classes"]) == [f"class {index}" for index in every]
    for found, expected in zip(details["classes"].values(), zip(*columns, strict=True), strict=True):
        assert list(found) == ["precision", "recall", "f1", "support"]
        assert list(found.values()) == pytest.approx(list(expected))


def test_a_confusion_has_a_row_for_each_true_class():
    details = TASK.details(evidence(TASK, np.array([0, 0, 0, 1]), outputs_of([0, 1, 1, 1])))
    assert details["confusion"] == [[1, 2], [0, 1]]
    assert details["classes"]["bad"] == pytest.approx({"precision": 1, "recall": 1 / 3, "f1": 1 / 2, "support": 3})


def test_the_first_metric_is_the_one_that_early_stopping_follows():
    assert next(iter(TASK.metrics(evidence(TASK, np.array([0, 1]), outputs_of([0, 1]))))) == TASK.metric


def test_log_loss_is_finite_for_outputs_that_are_sure_and_wrong():
    found = TASK.metrics(evidence(TASK, np.array([0, 1]), np.array([[-1e4, 1e4], [1e4, -1e4]], dtype=np.float32)))
    assert found["log_loss"] == pytest.approx(2e4)
    assert found["accuracy"] == 0


def test_an_interval_of_accuracy_is_about_that_of_a_proportion():
    truth, outputs = sample(seed=1, rows=800, classes=2, present=2)
    accuracy = score(TASK, truth, outputs).metrics["accuracy"]
    margin = 1.96 * np.sqrt(accuracy.value * (1 - accuracy.value) / 800)
    assert accuracy.value == sklearn.accuracy_score(truth, outputs.argmax(1))
    assert accuracy.low == pytest.approx(accuracy.value - margin, abs=margin / 10)
    assert accuracy.high == pytest.approx(accuracy.value + margin, abs=margin / 10)
    assert accuracy.count == 800


def test_every_metric_lies_in_its_interval_and_the_interval_is_repeatable():
    truth, outputs = sample(seed=2, rows=60, classes=3, present=3)
    first, second = (score(task_of(3), truth, outputs) for _ in range(2))
    assert first == second
    assert set(first.metrics) == set(task_of(3).metrics(evidence(task_of(3), truth, outputs)))
    for value in first.metrics.values():
        assert value.low < value.value < value.high


def test_scores_in_json_are_the_metrics_and_then_the_details():
    truth = np.array([0, 1, 1])
    found = score(TASK, truth, outputs_of([0, 1, 1])).to_json()
    assert found["accuracy"] == {"value": 1.0, "low": 1.0, "high": 1.0, "count": 3}
    assert found["confusion"] == [[1, 0], [0, 2]]
    assert list(found)[-2:] == ["classes", "confusion"]


def test_the_score_of_one_row_has_no_width():
    accuracy = score(TASK, np.array([1]), outputs_of([1])).metrics["accuracy"]
    assert str(accuracy) == "1.000 [1.000, 1.000]"


def test_the_difference_of_a_model_to_itself_is_nothing():
    truth, outputs = sample(seed=3, rows=50, classes=2, present=2)
    found = difference(TASK, truth, outputs, outputs)
    assert (found.value, found.low, found.high, found.count) == (0, 0, 0, 50)


def test_a_difference_has_its_sign_and_turns_with_its_sides():
    truth = np.array([0, 1] * 30)
    ours, theirs = outputs_of(truth.tolist()), outputs_of([0] * 60)
    found, turned = difference(TASK, truth, ours, theirs), difference(TASK, truth, theirs, ours)
    assert found.value == pytest.approx(0.5)
    assert 0.3 < found.low < 0.5 < found.high < 0.7
    assert (turned.value, turned.low, turned.high) == pytest.approx((-found.value, -found.high, -found.low))


def test_a_paired_interval_is_narrower_than_its_sides():
    truth, theirs = sample(seed=4, rows=400, classes=2, present=2)
    ours = theirs.copy()
    wrong = np.flatnonzero(theirs.argmax(1) != truth)[:20]
    ours[wrong] = outputs_of(truth[wrong].tolist())
    found = difference(TASK, truth, ours, theirs)
    alone = score(TASK, truth, ours).metrics["accuracy"]
    assert found.value == pytest.approx(20 / 400)
    assert found.low > 0.02
    assert found.high - found.low < 0.7 * (alone.high - alone.low)
