"""Any number of labels for a text: the loss, thresholds, scores, and a bundle from end to end."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn
from torch.nn.functional import binary_cross_entropy_with_logits

from lowres_ft import device
from lowres_ft.bundle import Bundle, open_bundle
from lowres_ft.events import Evaluated
from lowres_ft.merging import merge
from lowres_ft.pipeline import run
from lowres_ft.prediction import Predictor, evaluate_bundle, examples
from lowres_ft.tasks.base import Batch, Ragged
from lowres_ft.tasks.classification import Classification, Text
from tests.conftest import prepare, recipe
from tests.test_round_trip import compare
from tests.test_train import gradients, randomize

Bases = Callable[..., Path]
LABELS = ("cold", "good", "long")
TASK = Classification(labels=LABELS, multi_label=True)
OPEN = Classification(multi_label=True)
MANY = ("task.multi_label=true", "task.labels=null")


def ragged(rows: np.ndarray) -> Ragged:
    """(R, L) as rows of L items; outputs are (L, 1) a row."""
    return Ragged(rows.reshape(-1), np.arange(len(rows) + 1) * rows.shape[1])


def outputs_of(rows: np.ndarray) -> Ragged:
    return Ragged(rows.reshape(-1, 1), np.arange(len(rows) + 1) * rows.shape[1])


# Loss


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_torchs_binary_cross_entropy(smoothing: float):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=generator).bfloat16()
    targets = torch.randint(0, 2, (5, 3), generator=generator)
    task = TASK.model_copy(update={"label_smoothing": smoothing})
    batch = Batch(torch.zeros(5, 2), torch.ones(5, 2), targets, torch.arange(5))
    model = lambda **_: SimpleNamespace(logits=logits)  # noqa: E731
    loss = task.loss(model, batch) / task.counted(targets.numpy().reshape(-1))
    expected = binary_cross_entropy_with_logits(logits.float(), targets * (1 - smoothing) + smoothing / 2)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def test_weights_are_of_a_labels_positives_and_are_divided_by():
    logits = torch.tensor([[0.5, -1.0, 2.0], [0.1, 0.2, 0.3]])
    targets = torch.tensor([[1, 0, 0], [0, 1, 0]])
    task = TASK.model_copy(update={"class_weights": {"cold": 4.0, "good": 0.5}})
    weight = torch.tensor([[4.0, 1, 1], [1, 0.5, 1]])
    batch = Batch(torch.zeros(2, 2), torch.ones(2, 2), targets, torch.arange(2))
    loss = task.loss(lambda **_: SimpleNamespace(logits=logits), batch)
    expected = binary_cross_entropy_with_logits(logits, targets.float(), weight=weight, reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert task.counted(targets.numpy().reshape(-1)) == pytest.approx(float(weight.sum()))


def test_balanced_weights_are_the_rows_without_a_label_over_those_with_it():
    task = TASK.model_copy(update={"class_weights": "balanced"})
    labels = [["cold"], ["cold", "good"], ["0"], [], ["long", "cold", "good"]]
    rows = [Text("", "", labels=own) for own in labels]
    assert task.weigh(iter(rows)).class_weights == pytest.approx({"cold": 1 / 4, "good": 3 / 2, "long": 4})
    every = [Text("", "", labels=[*own, "cold"]) for own in labels]
    assert task.weigh(every).class_weights == pytest.approx({"cold": 1, "good": 3 / 2, "long": 4})


@pytest.mark.parametrize("changes", [(), ("task.class_weights=balanced", "task.label_smoothing=0.1")])
def test_every_cut_gives_the_same_gradient(bases: Bases, topics: Path, tmp_path: Path, changes: tuple[str, ...]):
    wanted = recipe(bases(), topics, *MANY, *changes, "train.batch_size=32")
    prepared = prepare(wanted, tmp_path)
    randomize(prepared)
    whole, parts = gradients(prepared, 10_000), gradients(prepared, 30)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, parts[name], rtol=1e-4, atol=1e-6, msg=name)


# Scores and thresholds


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 40), share=st.floats(0, 1), threshold=st.floats(0.01, 0.99))
def test_scores_are_scikit_learns(seed: int, rows: int, share: float, threshold: float):
    drawn = np.random.default_rng(seed)
    truth = (drawn.random((rows, 3)) < share).astype(np.int64)
    logits = drawn.normal(size=(rows, 3)).astype(np.float32) + truth
    task = TASK.model_copy(update={"thresholds": {"good": threshold}})
    predicted = 1 / (1 + np.exp(-logits.astype(np.float64))) >= [0.5, threshold, 0.5]
    evidence = task.evidence(ragged(truth), outputs_of(logits))
    expected = {
        f"{name}_{average}": getattr(sklearn, f"{name}_score")(truth, predicted, average=average, zero_division=0)
        for name in ("f1", "precision", "recall")
        for average in ("micro", "macro")
    } | {"subset_accuracy": sklearn.accuracy_score(truth, predicted)}
    found = task.metrics(evidence)
    assert found == pytest.approx(expected)
    assert list(found)[:3] == ["f1_micro", "f1_macro", "subset_accuracy"]
    assert task.metric == "f1_micro"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        columns = sklearn.precision_recall_fscore_support(truth, predicted, average=None, zero_division=0)
    for label, threshold_of, *values in zip(LABELS, (0.5, threshold, 0.5), *columns, strict=True):
        assert task.details(evidence)["classes"][label] == pytest.approx(
            dict(zip(("precision", "recall", "f1", "support"), values, strict=True)) | {"threshold": threshold_of}
        )


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 30), digits=st.integers(0, 3))
def test_tuned_thresholds_have_the_best_f1_that_there_is(seed: int, rows: int, digits: int):
    drawn = np.random.default_rng(seed)
    truth = drawn.integers(0, 2, (rows, 3))
    logits = np.round(drawn.normal(size=(rows, 3)), digits).astype(np.float32)  # of which many are equal
    task = TASK.tune(ragged(truth), outputs_of(logits))
    assert task == TASK.tune(ragged(truth), outputs_of(logits))
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    thresholds = task.uncalibrated().thresholds
    assert thresholds is not None
    for index, label in enumerate(LABELS):
        has, score, threshold = truth[:, index], scores[:, index], thresholds[label]
        f1 = [sklearn.f1_score(has, score >= at, zero_division=0) for at in [0.5, *score, threshold]]
        assert f1[-1] == pytest.approx(max(f1))
        assert threshold == 0.5 or f1[0] < f1[-1]
        assert not np.isclose(score, threshold, rtol=1e-9, atol=0).any() or threshold == 0.5


def test_thresholds_that_were_given_are_kept_and_a_label_without_rows_gets_one_half():
    task = TASK.model_copy(update={"thresholds": {"cold": 0.9}})
    truth = np.array([[1, 1, 0], [0, 0, 0], [1, 1, 0]])
    logits = np.array([[-3.0, -2.0, -1.0], [-4.0, -3.0, 2.0], [-3.0, 1.0, 3.0]])
    thresholds = task.tune(ragged(truth), outputs_of(logits)).thresholds
    assert thresholds is not None
    assert (thresholds["cold"], thresholds["long"]) == (0.9, 0.5)
    low, high = 1 / (1 + np.exp([3.0, 2.0]))
    assert thresholds["good"] == pytest.approx((low + high) / 2)


def test_thresholds_decide_predictions_and_choices():
    task = TASK.model_copy(update={"thresholds": {"cold": 0.9, "long": 0.1}})
    output = np.array([[1.0], [3.0], [-2.0]], dtype=np.float32)
    found = task.prediction(Text("a:1", "fine"), output)
    assert found["labels"] == ["good", "long"]
    assert found["scores"] == pytest.approx({"cold": 0.731059, "good": 0.952574, "long": 0.119203}, abs=1e-5)
    assert list(found) == ["text", "labels", "scores"]
    assert task.choice(output[:, 0]).tolist() == [False, True, True]
    assert task.line(found) == "good, long\t0.953, 0.119\tfine"
    nothing = task.prediction(Text("a:1", "two\nlines"), output - 50)
    assert nothing["labels"] == []
    assert task.line(nothing) == "\t\ttwo lines"


def test_baselines_decide_at_one_half_whatever_the_thresholds():
    words = [("cold day", ["cold"]), ("good day", ["good"]), ("good cold", ["cold", "good"]), ("day", [])]
    train = [Text("", text, labels=own) for text, own in words * 4 + words[:1]]
    test = [Text("", text, labels=own) for text, own in words]
    expected = [["cold"], ["good"], ["cold", "good"], []]
    for thresholds in (None, {"cold": 0.01, "good": 0.99}):
        task = TASK.model_copy(update={"thresholds": thresholds})
        found = task.baselines(train, test, seed=1)
        assert list(found) == ["majority", "tfidf"]
        answers = [task.prediction(row, output)["labels"] for row, output in zip(test, found["tfidf"], strict=True)]
        assert [sorted(own) for own in answers] == expected
        assert all(
            task.prediction(row, output)["labels"] == ["cold"]
            for row, output in zip(test, found["majority"], strict=True)
        )
        assert all(np.isfinite(outputs.values).all() for outputs in found.values())


# From end to end


@pytest.fixture(scope="session")
def bundle(bases: Bases, topics: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    changes = ("method.kind=full", "train.steps=250", "train.batch_size=16", "train.learning_rate=0.003")
    out = tmp_path_factory.mktemp("multi") / "bundle"
    return run(recipe(bases(), topics, *MANY, *changes), out, device_name="cpu")


def test_it_learns_what_can_be_learned(bundle: Bundle):
    report = json.loads((bundle.folder / "report.json").read_text())
    assert report["scores"]["test"]["f1_micro"]["value"] >= 0.95
    assert report["scores"]["test"]["f1_micro"]["count"] == 24
    assert set(report["scores"]["test"]["classes"]["cold"]) == {"precision", "recall", "f1", "support", "threshold"}
    assert report["baselines"]["tfidf"]["f1_micro"]["value"] == 1
    assert report["baselines"]["majority"]["gain"]["low"] > 0


def test_a_bundle_keeps_its_thresholds_and_predicts_with_them(bundle: Bundle, tmp_path: Path, topics: Path):
    opened = open_bundle(bundle.folder)
    task = opened.recipe.task
    assert isinstance(task, Classification)
    assert task.thresholds is not None
    assert set(task.thresholds) == set(LABELS)
    predictor = Predictor(*opened.load(device.find("cpu")))
    for found in predictor(examples(opened, str(topics))):
        given = {label for label, score in found["scores"].items() if score >= task.thresholds[label]}
        assert set(found["labels"]) == given
    again = evaluate_bundle(opened, predictor.adapted, predictor.plan, tmp_path).to_json()
    assert again == opened.passport.scores["test"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_round_trips_through_a_fresh_process_and_through_peft(
    bases: Bases, topics: Path, tmp_path: Path, method: str
):
    names = ("bert", "deberta-v2", "gpt2")
    changes = ("task.multi_label=true", "task.labels=[long, cold, good]", f"method.kind={method}")
    wanted = {name: recipe(bases(name), topics, *changes, "train.learning_rate=0.001") for name in names}
    for folder in compare(wanted, tmp_path, labels=("long", "cold", "good")).values():
        card = (folder / "README.md").read_text()
        assert ('problem_type="multi_label_classification"' in card) == (method == "lora")


def test_a_merge_compares_what_the_thresholds_decide(bases: Bases, topics: Path, tmp_path: Path):
    bundle = run(recipe(bases(), topics, *MANY), tmp_path / "bundle", device_name="cpu")
    merged = merge(bundle, tmp_path / "merged", device.find("cpu"))
    assert merged.flipped == 0
    assert merged.metric == bundle.passport.scores["test"]["f1_micro"]["value"]
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"


def test_the_best_step_is_told_by_the_tuned_thresholds(bases: Bases, topics: Path, tmp_path: Path):
    """At a threshold of 0.5 the first steps give no label at all, so that any later one would be no better."""
    slow = recipe(bases(), topics, *MANY, "train.steps=4", "train.evaluate_every=1", "train.learning_rate=1e-6")
    seen: list[float] = []

    def listen(event: object) -> None:
        if isinstance(event, Evaluated):
            seen.append(event.value)

    bundle = run(slow, tmp_path / "bundle", device_name="cpu", listen=listen)
    told = json.loads((bundle.folder / "report.json").read_text())["scores"]["validation"]["f1_micro"]["value"]
    assert max(seen) == told > 0
