"""A run as a whole: what it leaves behind, in success and in failure; one process and two."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from lowres_ft import data, device, forked, limits, pipeline
from lowres_ft.bundle import Bundle
from lowres_ft.errors import BundleError, DataError, ModelError, OutputError, TrainingError
from lowres_ft.events import Evaluated, Event, Note, Trained
from lowres_ft.pipeline import run
from lowres_ft.preparing import rehearse
from tests import tiny
from tests.conftest import recipe

Bases = Callable[..., Path]
Trainer = Callable[..., Bundle]


def test_a_bundle_holds_what_the_design_says(bases: Bases, reviews: Path, tmp_path: Path):
    bundle = run(recipe(bases(), reviews), tmp_path / "bundle", device_name="cpu")
    assert sorted(path.name for path in bundle.folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "lowres.json",
        "probe.safetensors",
        "recipe.yaml",
        "report.html",
        "report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not bundle.folder.with_name("bundle.run").exists()


def test_the_report_has_the_keys_that_programs_rely_on(trained: Trainer):
    bundle = trained()
    report = json.loads((bundle.folder / "report.json").read_text())
    assert {"recipe", "plan", "measured", "trainable_parameters", "adapter_bytes", "scores", "baselines"} < set(report)
    for key in ("peak_bytes", "train_seconds", "tokens_per_second", "examples_per_second"):
        assert report["measured"][key] > 0
    for scores in (report["scores"]["test"], report["baselines"]["majority"], report["baselines"]["tfidf"]):
        assert set(scores["accuracy"]) == {"value", "low", "high", "count"}
        assert scores["accuracy"]["low"] <= scores["accuracy"]["value"] <= scores["accuracy"]["high"]
        assert sum(map(sum, scores["confusion"])) == scores["accuracy"]["count"]
    assert report["versions"]["torch"]
    assert report["adapter_bytes"] == (bundle.folder / "adapter_model.safetensors").stat().st_size


def test_it_learns_what_can_be_learned(bases: Bases, tmp_path: Path):
    rows = tiny.reviews(tmp_path / "many.csv", rows=200)
    run(recipe(bases(), rows, "train.steps=80"), tmp_path / "bundle", device_name="cpu")
    report = json.loads((tmp_path / "bundle" / "report.json").read_text())
    assert report["scores"]["test"]["accuracy"]["value"] >= 0.85
    assert report["baselines"]["majority"]["gain"]["low"] > 0


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_the_same_recipe_gives_the_same_bytes_and_another_seed_others(
    bases: Bases, reviews: Path, tmp_path: Path, quantize: str
):
    changes = (f"model.quantize={quantize}", "method.dropout=0.1")
    weights = []
    for name, more in (("first", ()), ("again", ()), ("other", ("train.seed=8",))):
        found = run(recipe(bases(), reviews, *changes, *more), tmp_path / name, device_name="cpu")
        weights.append((found.folder / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_events_tell_every_step_and_evaluation(bases: Bases, reviews: Path, tmp_path: Path):
    seen: list[Event] = []
    wanted = recipe(bases(), reviews, "train.steps=5", "train.evaluate_every=2", "data.test=null")
    run(wanted, tmp_path / "bundle", device_name="cpu", listen=seen.append)
    assert [event.step.number for event in seen if isinstance(event, Trained)] == [1, 2, 3, 4, 5]
    assert [event.step for event in seen if isinstance(event, Evaluated)] == [2, 4, 5]
    report = json.loads((tmp_path / "bundle" / "report.json").read_text())
    assert set(report["scores"]) == {"validation"}
    assert report["baselines"] == {}


def test_without_held_out_rows_the_last_step_is_bundled(trained: Trainer):
    bundle = trained("bert", "data.validation=null", "data.test=null")
    report = json.loads((bundle.folder / "report.json").read_text())
    assert report["scores"] == {}
    assert report["measured"]["best_step"] == 2


def test_a_published_test_split_is_scored_with_and_without_the_texts_of_train(
    bases: Bases, reviews: Path, tmp_path: Path
):
    lines = reviews.read_text().splitlines()
    test = tmp_path / "test.csv"
    test.write_text("\n".join([lines[0], *lines[1:5], "a new text,good", "another text,bad"]) + "\n")
    seen: list[Event] = []
    run(recipe(bases(), reviews, f"data.test={test}", "data.validation=null"), tmp_path / "b", listen=seen.append)
    scores = json.loads((tmp_path / "b" / "report.json").read_text())["scores"]
    assert scores["test"]["accuracy"]["count"] == 6
    assert scores["test_without_train_texts"]["accuracy"]["count"] == 2
    assert any("4 of 6 test texts stand in train too" in event.text for event in seen if isinstance(event, Note))


def test_a_place_that_is_taken_is_refused_and_the_default_takes_the_next(
    bases: Bases, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="taken exists"):
        run(recipe(bases(), reviews), tmp_path / "taken", device_name="cpu")
    monkeypatch.chdir(tmp_path)
    places = [run(recipe(bases(), reviews), device_name="cpu").folder for _ in range(2)]
    assert places == [Path("runs/tiny"), Path("runs/tiny-2")]
    assert sorted(path.name for path in Path("runs").iterdir()) == ["tiny", "tiny-2"]


def test_two_runs_in_one_folder_are_refused(bases: Bases, reviews: Path, tmp_path: Path):
    (tmp_path / "bundle.run").mkdir()
    with FileLock(tmp_path / "bundle.run" / "lock"), pytest.raises(OutputError, match="another run is writing"):
        run(recipe(bases(), reviews), tmp_path / "bundle", device_name="cpu")


def test_a_folder_of_the_users_is_not_taken(bases: Bases, reviews: Path, tmp_path: Path):
    (tmp_path / "exp.run").mkdir()
    (tmp_path / "exp.run" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"exp\.run is where the run would keep its files, but it holds notes\.txt"):
        run(recipe(bases(), reviews), tmp_path / "exp", device_name="cpu")
    assert [path.name for path in (tmp_path / "exp.run").iterdir()] == ["notes.txt"]


def test_a_run_that_fails_in_mid_training_keeps_its_metrics(bases: Bases, reviews: Path, tmp_path: Path):
    wanted = recipe(bases(), reviews, "train.steps=50", "train.learning_rate=1e30", "train.clip=null")
    with pytest.raises(TrainingError, match="is not finite") as caught:
        run(wanted, tmp_path / "bundle", device_name="cpu")
    assert "keeps plan.json and metrics.jsonl" in caught.value.__notes__[0]


def test_without_validation_no_row_of_train_is_given_away(trained: Trainer):
    assert not (trained("bert", "data.validation=null").folder / "probe.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ("data.train=nowhere.csv", DataError),
        ("model.base=./nowhere", ModelError),
        ("method.targets=[nothing]", ModelError),
        ("task.labels=[bad, good, ugly]", DataError),
    ],
)
def test_a_run_that_fails_early_leaves_nothing(
    bases: Bases, reviews: Path, tmp_path: Path, change: str, kind: type[Exception]
):
    with pytest.raises(kind):
        run(recipe(bases(), reviews, change), tmp_path / "bundle", device_name="cpu")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_keeps_its_metrics_and_says_so(bases: Bases, reviews: Path, tmp_path: Path):
    def interrupt(event: Event) -> None:
        if isinstance(event, Trained) and event.step.number == 3:
            raise KeyboardInterrupt

    wanted = recipe(bases(), reviews, "train.steps=10")
    with pytest.raises(KeyboardInterrupt) as caught:
        run(wanted, tmp_path / "bundle", device_name="cpu", listen=interrupt)
    assert "no bundle was written;" in caught.value.__notes__[0]
    kept = tmp_path / "bundle.run"
    assert {path.name for path in kept.iterdir()} - {"lock"} == {"metrics.jsonl", "plan.json", "run.json"}
    lines = [json.loads(line) for line in (kept / "metrics.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == [1, 2, 3]
    assert all(line["loss"] > 0 for line in lines)
    bundle = run(wanted, tmp_path / "bundle", device_name="cpu")
    assert bundle.folder.is_dir()
    assert not kept.exists()


def test_a_rehearsal_trains_nothing(bases: Bases, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found = rehearse(recipe(bases(), reviews, "train.epochs=3", "train.steps=null"), device_name="cpu")
    assert found.rows == {"train": 48, "validation": 6, "test": 6}
    assert found.steps == 18
    assert 0 < found.trainable_parameters < found.profile.parameters
    assert list(tmp_path.iterdir()) == []


def test_a_run_begins_with_a_peak_of_its_own_and_gives_back_what_reading_took(
    bases: Bases, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done: list[str] = []

    def noted(module: object, name: str) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: (done.append(name), real(*given))[1])

    for module, name in ((device, "forget_peak"), (data, "load"), (limits, "trim")):
        noted(module, name)
    monkeypatch.setattr(pipeline, "_experiment", lambda *_: None)
    with pytest.raises(BundleError):
        run(recipe(bases(), reviews), tmp_path / "out", device_name="cpu")
    assert done == ["trim", "forget_peak", "load", "trim"]


def test_two_processes_do_the_same_experiment_as_one(bases: Bases, reviews: Path, tmp_path: Path):
    wanted = recipe(bases(), reviews, "train.steps=4", "method.dropout=0.1", "train.batch_size=9")
    alone: list[Event] = []
    run(wanted, tmp_path / "alone", device_name="cpu", listen=alone.append)
    (tmp_path / "wanted.yaml").write_text(wanted.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "lowres_ft"]
    command += ["recipe", str(tmp_path / "wanted.yaml"), "--out", str(tmp_path / "both"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('"adapter_bytes"') == 1  # one process prints
    single, double = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("alone", "both"))
    assert double["plan"]["processes"] == 2
    assert double["measured"]["tokens"] == single["measured"]["tokens"]
    from lowres_ft.border import read_adapter

    weights = [read_adapter(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "both")]
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() < 1e-4, name


def test_what_a_bound_leaves_no_room_for_is_left_out_and_told(
    bases: Bases, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object, room: int | None, **__: object) -> None:
        assert room == 7
        raise forked.NoRoomError("MemoryError()")

    monkeypatch.setattr(forked, "result", full)
    monkeypatch.setattr(limits, "room_beside", lambda: 7)
    wanted = recipe(bases(), reviews, "train.steps=2")
    report = json.loads((run(wanted, tmp_path / "out", device_name="cpu").folder / "report.json").read_bytes())
    assert report["baselines"] == {}
    left = "the trained baselines were left out: they failed within the memory that was left (MemoryError())"
    assert left in report["notes"]
    looked = [note for note in report["notes"] if "failed within the memory that was left" in note and note != left]
    assert len(looked) == 1
    assert "mislabelled" in looked[0]
