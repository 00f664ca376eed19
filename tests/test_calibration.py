"""Temperature, expected calibration error, and what a bundle does with them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.special import expit

from lowres_ft import calibration, device, files
from lowres_ft.bundle import Bundle, open_bundle
from lowres_ft.errors import BundleError
from lowres_ft.events import Note
from lowres_ft.exhibits import untold_temperature
from lowres_ft.merging import merge
from lowres_ft.pipeline import run
from lowres_ft.prediction import Predictor
from lowres_ft.tasks.base import Ragged
from lowres_ft.tasks.chat import Chat
from lowres_ft.tasks.classification import Classification
from lowres_ft.tasks.ner import Ner
from tests import tiny_chat
from tests.conftest import Command, recipe

Bases = Callable[..., Path]
Trainer = Callable[..., Bundle]
CPU = device.find("cpu")
LABELS = ("a", "b", "c")
SINGLE = Classification(labels=LABELS)
MANY = Classification(labels=LABELS, multi_label=True)
TAGS = Ner(labels=("LOC",))


def drawn(true_temperature: float, rows: int = 4000, seed: int = 0) -> tuple[Ragged, Ragged]:
    """Logits, and classes drawn with the probabilities of logits / temperature."""
    random = np.random.default_rng(seed)
    logits = (4 * random.normal(size=(rows, 3))).astype(np.float32)
    truth = (logits / true_temperature + random.gumbel(size=logits.shape)).argmax(1)
    starts = np.arange(rows + 1)
    return Ragged(truth, starts), Ragged(logits, starts)


def drawn_labels(true_temperature: float, rows: int = 3000) -> tuple[Ragged, Ragged]:
    random = np.random.default_rng(0)
    logits = (4 * random.normal(size=(rows * 3, 1))).astype(np.float32)
    truth = (random.random(rows * 3) < expit(logits[:, 0] / true_temperature)).astype(np.int64)
    starts = np.arange(rows + 1) * 3
    return Ragged(truth, starts), Ragged(logits, starts)


# Temperature


@pytest.mark.parametrize("wanted", [0.4, 1.0, 2.5])
@pytest.mark.parametrize(("task", "rows"), [(SINGLE, drawn), (MANY, drawn_labels), (TAGS, drawn)])
def test_the_temperature_that_rows_were_drawn_with_is_found(task, rows, wanted: float):
    truth, outputs = rows(wanted)
    assert task.tune(truth, outputs).temperature == pytest.approx(wanted, rel=0.1)


def test_it_is_where_torch_finds_the_least_loss():
    truth, outputs = drawn(1.7, rows=300)
    inverse = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([inverse], max_iter=100, line_search_fn="strong_wolfe")
    logits, targets = torch.tensor(outputs.values.astype(np.float64)), torch.tensor(truth.values)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits * inverse, targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert SINGLE.tune(truth, outputs).temperature == pytest.approx(1 / inverse.item(), rel=1e-3)


def test_rows_that_tell_no_temperature_give_none():
    truth, outputs = drawn(1.0, rows=50)
    sure = Ragged(np.eye(3, dtype=np.float32)[truth.values], truth.starts)
    assert SINGLE.tune(truth, sure).temperature is None
    wrong = Ragged(-sure.values, truth.starts)
    assert SINGLE.tune(truth, wrong).temperature is None
    assert "no temperature is best" in untold_temperature(SINGLE, {"validation": outputs})
    assert "there are none" in untold_temperature(SINGLE, {"test": outputs})
    assert untold_temperature(SINGLE.model_copy(update={"temperature": 1.1}), {}) == ""
    assert untold_temperature(Classification(labels=LABELS, calibrate=False), {}) == ""
    assert untold_temperature(Chat(), {}) == ""


def test_a_temperature_that_is_given_is_kept_and_none_is_fitted_unasked():
    truth, outputs = drawn(2.0)
    assert Classification(labels=LABELS, temperature=3.0).tune(truth, outputs).temperature == 3.0
    assert Classification(labels=LABELS, calibrate=False).tune(truth, outputs).temperature is None
    with pytest.raises(ValidationError, match="calibrate=true"):
        Classification(labels=LABELS, calibrate=False, temperature=2.0)
    with pytest.raises(ValidationError):
        Classification(labels=LABELS, temperature=0.0)


@settings(max_examples=50, deadline=None)
@given(temperature=st.floats(0.05, 20), seed=st.integers(0, 1000))
def test_no_answer_changes(temperature: float, seed: int):
    random = np.random.default_rng(seed)
    _, outputs = drawn(1.0, rows=30, seed=seed)
    hot = SINGLE.model_copy(update={"temperature": temperature})
    for output in outputs:
        assert (
            hot.prediction(hot.read({"text": "x"}, ""), output)["label"]
            == (SINGLE.prediction(SINGLE.read({"text": "x"}, ""), output)["label"])
        )
    labels = Ragged((random.random(90) < 0.4).astype(np.int64), np.arange(31) * 3)
    logits = Ragged(random.normal(size=(90, 1)).astype(np.float32), labels.starts)
    plain = Classification(labels=LABELS, multi_label=True, calibrate=False).tune(labels, logits)
    many = Classification(labels=LABELS, multi_label=True, temperature=temperature).tune(labels, logits)
    assert many.temperature == temperature
    for task in (many, many.uncalibrated()):
        assert np.array_equal(task.evidence(labels, logits), plain.evidence(labels, logits))
    assert many.uncalibrated().thresholds == pytest.approx(plain.thresholds)


@pytest.mark.parametrize("task", [SINGLE, MANY.model_copy(update={"thresholds": dict.fromkeys(LABELS, 0.3)})])
def test_baselines_keep_their_own_probabilities(task: Classification):
    rows = [SINGLE.read({"text": f"word{n % 3} of row {n}", "label": LABELS[n % 3]}, "") for n in range(30)]
    classes = np.arange(30) % 3
    truth = Ragged(classes, np.arange(31))
    if task.multi_label:
        truth = Ragged(np.eye(3, dtype=np.int64)[classes].reshape(-1), np.arange(31) * 3)
    evidence = [
        {name: one.evidence(truth, outputs) for name, outputs in one.baselines(iter(rows), iter(rows), 0).items()}
        for one in (task, task.model_copy(update={"temperature": 4.0}))
    ]
    assert set(evidence[0]) == {"majority", "tfidf"}
    for name, expected in evidence[0].items():
        assert evidence[1][name] == pytest.approx(expected)


# Expected calibration error


def test_the_error_of_a_small_case_by_hand():
    # 30 answers of probability 0.9, of which 24 are right, and 30 of 0.6, of which 18 are
    sure = np.array([[0.9, n < 24, np.log(0.9)] for n in range(30)] + [[0.6, n < 18, np.log(0.6)] for n in range(30)])
    found = calibration.reliability(sure)
    assert found["ece"] == pytest.approx(0.5 * abs(0.8 - 0.9) + 0.5 * 0.0)
    assert found["bins"] == [
        {"probability": pytest.approx(0.6), "right": pytest.approx(0.6), "count": 30},
        {"probability": pytest.approx(0.9), "right": pytest.approx(0.8), "count": 30},
    ]
    assert found["log_loss"] == pytest.approx(-(np.log(0.9) + np.log(0.6)) / 2)


def test_bins_hold_equally_many_answers_and_the_order_of_rows_changes_nothing():
    random = np.random.default_rng(0)
    sure = np.stack([random.random(1500), random.random(1500) < 0.5, -random.random(1500)], axis=1)
    found = calibration.reliability(sure)
    assert [one["count"] for one in found["bins"]] == [100] * calibration.BINS
    tied = np.round(sure, 1)
    first, again = calibration.reliability(tied), calibration.reliability(random.permutation(tied))
    assert first["ece"] == pytest.approx(again["ece"])
    assert sum(one["count"] for one in first["bins"]) == 1500


def test_perfect_probabilities_have_a_small_error_and_overconfidence_a_great_one():
    truth, outputs = drawn(1.0, rows=20_000)
    errors = [
        calibration.reliability(SINGLE.model_copy(update={"temperature": t}).certainty(truth, outputs))["ece"]
        for t in (1.0, 0.2)
    ]
    assert errors[0] < 0.02
    assert errors[1] > 0.1


# Bundles


def test_a_bundle_keeps_its_temperature_and_tells_both_errors(trained: Trainer, lowres: Command):
    bundle = trained("bert", "data.validation=0.4")
    report = json.loads((bundle.folder / "report.json").read_text())["calibration"]
    assert report["temperature"] == open_bundle(bundle.folder).recipe.task.temperature
    assert report["temperature"] != 1.0
    for split in ("validation", "test"):
        assert set(report[split]["before"]) == {"ece", "log_loss", "count", "bins"}
    assert report["validation"]["after"]["log_loss"] <= report["validation"]["before"]["log_loss"]
    assert f"{report['temperature']:g}" in (bundle.folder / "README.md").read_text()

    texts = ["the film was good", "the plot was dull"]
    loaded = bundle.load(CPU)
    scaled, plain = (list(Predictor(*loaded, calibrated=own).texts(texts)) for own in (True, False))
    for one, other in zip(scaled, plain, strict=True):
        assert one["label"] == other["label"]
        logit = [np.log(found["scores"]["good"] / found["scores"]["bad"]) for found in (one, other)]
        assert logit[0] * report["temperature"] == pytest.approx(logit[1], rel=1e-5)
    for options, expected in ([], scaled), (["--uncalibrated"], plain):
        _, out, _ = lowres("predict", bundle.folder, *texts, "--json", "-q", *options)
        assert [json.loads(line) for line in out.splitlines()] == expected


def test_no_temperature_without_validation_or_where_none_is_wanted(bases: Bases, reviews: Path, tmp_path: Path):
    for name, change, told in (("a", "data.validation=null", True), ("b", "task.calibrate=false", False)):
        heard: list[object] = []
        bundle = run(recipe(bases(), reviews, change), tmp_path / name, device_name="cpu", listen=heard.append)
        report = json.loads((bundle.folder / "report.json").read_text())
        assert report["calibration"]["temperature"] is None
        assert report["calibration"]["test"]["before"] == report["calibration"]["test"]["after"]
        notes = [event.text for event in heard if isinstance(event, Note)]
        assert any("not calibrated" in note for note in notes) == told
        assert any("not calibrated" in note for note in report["notes"]) == told
        assert bundle.recipe.task.temperature is None


def test_another_temperature_is_noticed_and_a_bundle_from_before_still_loads(trained: Trainer):
    bundle = trained("bert", "data.validation=0.4")
    path = bundle.folder / "recipe.yaml"
    written = path.read_text()
    assert "temperature: " in written
    path.write_text(written.replace("temperature: ", "temperature: 1"))
    with pytest.raises(BundleError, match=r"recipe\.yaml is not what"):
        open_bundle(bundle.folder)
    older = [
        line
        for line in written.splitlines()
        if not line.strip().startswith(("temperature", "calibrate", "report_rows"))
    ]
    path.write_text("\n".join(older) + "\n")
    passport = json.loads((bundle.folder / "lowres.json").read_text())
    del passport["digest"]  # which earlier versions did not write
    passport["files"]["recipe.yaml"] = {"sha256": files.sha256(path), "size": path.stat().st_size}
    (bundle.folder / "lowres.json").write_text(json.dumps(passport))
    opened = open_bundle(bundle.folder)
    assert opened.recipe.task.temperature is None
    assert opened.verify(CPU).largest_difference == 0.0


def test_a_merged_model_says_that_its_probabilities_are_not_calibrated(
    trained: Trainer, tmp_path: Path, lowres: Command
):
    bundle = trained("bert", "data.validation=0.4")
    temperature = bundle.recipe.task.temperature
    code, out, _ = lowres("merge", bundle.folder, tmp_path / "merged", "-q")
    assert code == 0
    assert f"divide its logits by {temperature:g}" in out
    assert f"Divide logits by {temperature:g}" in (tmp_path / "merged" / "README.md").read_text()
    assert merge(bundle, tmp_path / "again", CPU).temperature == temperature


def test_probabilities_of_a_model_that_writes_are_refused(
    lowres: Command, chat_bases: Bases, chats: Path, tmp_path: Path
):
    bundle = run(tiny_chat.recipe(chat_bases(), chats), tmp_path / "chat", device_name="cpu")
    assert json.loads((bundle.folder / "report.json").read_text())["calibration"] == {}
    code, _, err = lowres("predict", bundle.folder, "Hello", "--uncalibrated", "-q")
    assert code == 2
    assert "no probabilities" in err
