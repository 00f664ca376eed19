"""Interrupted runs go on to the same bytes, or say why they do not."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from filelock import FileLock

from lowres_ft import checkpoint, files, resuming
from lowres_ft.cli import recipes
from lowres_ft.errors import LowresError, OutputError
from lowres_ft.events import Event, Note, Stage, Trained
from lowres_ft.pipeline import run
from lowres_ft.recipe import Recipe
from lowres_ft.runs import unfinished
from tests.conftest import recipe

Bases = Callable[..., Path]
LONG = ("train.epochs=3", "train.steps=null", "train.checkpoint_every=2", "method.dropout=0.1")
STOPPING = ("train.early_stopping.patience=2", "train.evaluate_every=3")


class Killed(BaseException):
    """What ends a run where no handler of ours is asked."""


def stop_at(step: int) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if isinstance(event, Trained) and event.step.number == step:
            raise Killed

    return listen


def adapter(folder: Path) -> bytes:
    return next(folder.glob("*model.safetensors")).read_bytes()


def interrupted(wanted: Recipe, out: Path, step: int) -> None:
    with pytest.raises(Killed):
        run(wanted, out, device_name="cpu", listen=stop_at(step))


@pytest.fixture(scope="module")
def wanted(bases: Bases, reviews: Path) -> Recipe:
    return recipe(bases(), reviews, *LONG, *STOPPING)


@pytest.fixture(scope="module")
def straight(wanted: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a run that was not interrupted."""
    return run(wanted, tmp_path_factory.mktemp("straight") / "bundle", device_name="cpu").folder


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "head", "full"])
def test_a_resumed_run_ends_in_the_same_bytes(bases: Bases, reviews: Path, tmp_path: Path, method: str):
    changes = [*LONG[:3], *STOPPING, f"method.kind={method}"]
    changes += ["method.dropout=0.1"] if method in ("lora", "dora") else []
    wanted = recipe(bases(), reviews, *changes)
    straight = run(wanted, tmp_path / "straight", device_name="cpu")
    out = tmp_path / "out"
    interrupted(wanted, out, 5)
    with pytest.raises(Killed):
        run(wanted, out, device_name="cpu", listen=stop_at(8), resume=True)
    seen: list[Event] = []
    resumed = run(wanted, out, device_name="cpu", listen=seen.append, resume=True)
    assert adapter(resumed.folder) == adapter(straight.folder)
    first = next(event.step.number for event in seen if isinstance(event, Trained))
    assert first == 7  # after the checkpoint of step 6
    reports = [json.loads((place / "report.json").read_text()) for place in (straight.folder, out)]
    assert reports[0]["curves"] == reports[1]["curves"]
    assert reports[0]["scores"] == reports[1]["scores"]
    assert [report["measured"]["resumed"] for report in reports] == [0, 2]
    assert reports[0]["measured"]["tokens"] == reports[1]["measured"]["tokens"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "straight"]


@pytest.mark.parametrize("stage", ["scoring", "loading what was written"])
def test_what_was_trained_is_not_trained_again(wanted: Recipe, straight: Path, tmp_path: Path, stage: str):
    def listen(event: Event) -> None:
        if isinstance(event, Stage) and event.text.startswith(stage):
            raise Killed

    with pytest.raises(Killed):
        run(wanted, tmp_path / "out", device_name="cpu", listen=listen)
    seen: list[Event] = []
    resumed = run(wanted, tmp_path / "out", device_name="cpu", listen=seen.append, resume=True)
    assert not [event for event in seen if isinstance(event, Trained)]
    assert adapter(resumed.folder) == adapter(straight)


def test_an_unfinished_run_is_left_alone_unless_told(wanted: Recipe, tmp_path: Path):
    out = tmp_path / "out"
    interrupted(wanted, out, 5)
    before = {path: path.read_bytes() for path in (tmp_path / "out.run").rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="holds an unfinished run, at step 4 of 18") as caught:
        run(wanted, out, device_name="cpu")
    assert caught.value.hint == "--resume goes on; --restart begins anew."
    assert {path: path.read_bytes() for path in (tmp_path / "out.run").rglob("*") if path.is_file()} == before
    seen: list[Event] = []
    run(wanted, out, device_name="cpu", listen=seen.append, resume=False)
    assert next(event.step.number for event in seen if isinstance(event, Trained)) == 1


def test_another_experiment_is_refused_with_what_differs(bases: Bases, reviews: Path, wanted: Recipe, tmp_path: Path):
    interrupted(wanted, tmp_path / "out", 5)
    for change, told in {
        "train.learning_rate=0.02": "train.learning_rate: was 0.01, is 0.02",
        "train.seed=8": "train.seed: was 7, is 8",
        "train.batch_size=4": "train.batch_size: was 8, is 4",
        "method.rank=8": "method.rank: was 4, is 8",
    }.items():
        with pytest.raises(OutputError, match="holds a run of another experiment") as caught:
            run(recipe(bases(), reviews, *LONG, *STOPPING, change), tmp_path / "out", device_name="cpu", resume=True)
        assert caught.value.message.splitlines()[1:] == [f"  {told}"]
    assert run(wanted, tmp_path / "out", device_name="cpu", resume=True).folder.is_dir()


def test_changed_rows_and_a_changed_base_are_refused(bases: Bases, reviews: Path, tmp_path: Path):
    rows = tmp_path / "rows.csv"
    rows.write_bytes(reviews.read_bytes())
    wanted = recipe(bases(), rows, *LONG)
    interrupted(wanted, tmp_path / "out", 5)
    rows.write_text(reviews.read_text().replace("was good", "is good", 1))
    with pytest.raises(OutputError, match=r"another experiment\n  data\.\w+: was"):
        run(wanted, tmp_path / "out", device_name="cpu", resume=True)
    rows.write_bytes(reviews.read_bytes())
    assert run(wanted, tmp_path / "out", device_name="cpu", resume=True).folder.is_dir()


def test_how_it_is_computed_and_saved_may_change(bases: Bases, reviews: Path, wanted: Recipe, tmp_path: Path):
    interrupted(wanted, tmp_path / "out", 5)
    other = recipe(bases(), reviews, *LONG, *STOPPING, "train.checkpoint_every=5m", "budget.recompute=layers")
    seen: list[Event] = []
    run(other, tmp_path / "out", device_name="cpu", listen=seen.append, resume=True)
    told = "the budget was changed, and with it the plan (recompute: was 'none', is 'layers')"
    assert any(event.text.startswith(told) for event in seen if isinstance(event, Note))


def test_other_versions_are_told(wanted: Recipe, tmp_path: Path):
    interrupted(wanted, tmp_path / "out", 5)
    place = tmp_path / "out.run" / "run.json"
    content = json.loads(place.read_text())
    content["machine"]["torch"] = "1.0"
    place.write_text(json.dumps(content))
    seen: list[Event] = []
    run(wanted, tmp_path / "out", device_name="cpu", listen=seen.append, resume=True)
    assert any("torch: was" in event.text and "not to the byte" in event.text for event in seen if type(event) is Note)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(wanted: Recipe, straight: Path, tmp_path: Path):
    interrupted(wanted, tmp_path / "out", 7)
    last, before = sorted((tmp_path / "out.run" / "checkpoints").iterdir(), reverse=True)
    content = bytearray((last / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (last / "tensors.safetensors").write_bytes(content)
    found, damaged = checkpoint.newest(last.parent)
    assert found is not None
    assert found.folder == before
    seen: list[Event] = []
    resumed = run(wanted, tmp_path / "out", device_name="cpu", listen=seen.append, resume=True)
    assert Note(damaged[0]) in seen
    assert adapter(resumed.folder) == adapter(straight)


def test_a_resume_without_a_checkpoint_begins_and_says_so(wanted: Recipe, tmp_path: Path):
    seen: list[Event] = []
    run(wanted, tmp_path / "out", device_name="cpu", listen=seen.append, resume=True)
    assert any("holds no checkpoint" in event.text for event in seen if isinstance(event, Note))


def test_a_finished_run_is_not_run_again(bases: Bases, reviews: Path, wanted: Recipe, tmp_path: Path):
    first = run(wanted, tmp_path / "out", device_name="cpu")
    before = (first.folder / "lowres.json").read_bytes()
    seen: list[Event] = []
    again = run(wanted, tmp_path / "out", device_name="cpu", listen=seen.append, resume=True)
    assert [event.text for event in seen if isinstance(event, Note)] == [
        f"{tmp_path / 'out'} is the finished bundle of this recipe"
    ]
    assert (again.folder / "lowres.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(OutputError, match="out exists"):
        run(recipe(bases(), reviews, "train.seed=8"), tmp_path / "out", device_name="cpu", resume=True)


@pytest.mark.parametrize("place", [".", "..", "/", "bundle/.."])
def test_a_place_without_a_name_of_its_own_can_be_looked_at(
    wanted: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    (tmp_path / "bundle").mkdir()
    monkeypatch.chdir(tmp_path / "bundle")
    assert unfinished(wanted, Path(place)) is None
    with pytest.raises(OutputError, match="exists"):
        run(wanted, place.replace("bundle/", ""), device_name="cpu", resume=True)
    assert resuming.folder_of(Path()) == tmp_path / "bundle.run"
    assert resuming.folder_of(Path("a/b")) == Path("a/b.run")


def test_a_finished_run_can_be_resumed_from_within(wanted: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(wanted, tmp_path / "out", device_name="cpu")
    monkeypatch.chdir(tmp_path / "out")
    assert run(wanted, ".", device_name="cpu", resume=True).folder == Path()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_default_place_goes_on_with_the_same_experiment(
    bases: Bases, reviews: Path, wanted: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Killed):
        run(wanted, device_name="cpu", listen=stop_at(5))
    other = recipe(bases(), reviews)
    assert run(other, device_name="cpu").folder == Path("runs/tiny-2")
    found = unfinished(wanted, None)
    assert found is not None
    assert (found.checkpoint.step, found.checkpoint.total, found.same) == (4, 18, True)
    with pytest.raises(OutputError, match=r"runs/tiny\.run holds an unfinished run"):
        run(wanted, device_name="cpu")
    assert run(wanted, device_name="cpu", resume=True).folder == Path("runs/tiny")
    assert sorted(path.name for path in Path("runs").iterdir()) == ["tiny", "tiny-2"]


def test_a_run_that_goes_on_elsewhere_is_not_taken(wanted: Recipe, tmp_path: Path):
    interrupted(wanted, tmp_path / "out", 5)
    with (
        FileLock(tmp_path / "out.run" / "lock"),
        pytest.raises(OutputError, match="another run is writing"),
    ):
        run(wanted, tmp_path / "out", device_name="cpu", resume=True)


def test_resume_and_restart_exclude_each_other(lowres: Callable[..., tuple[int, str, str]]):
    code, out, err = lowres("recipe", "sentiment-lora", "--resume", "--restart")
    assert (code, out) == (2, "")
    assert "not both" in err


def test_too_little_room_is_told_before_a_step(wanted: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Full:
        free = 1000

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: Full)
    seen: list[Event] = []
    with pytest.raises(OutputError, match=r"need .* MiB, and 1000 B are free"):
        run(wanted, tmp_path / "out", device_name="cpu", listen=seen.append)
    assert not [event for event in seen if isinstance(event, Trained)]


def test_a_checkpoint_that_cannot_be_written_stops_the_run_and_keeps_the_older(
    wanted: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = files.publish

    def publish(folder: Path, place: Path) -> None:
        if place.name.startswith("00000006"):
            raise OutputError(f"{place}: cannot be written: No space left on device")
        real(folder, place)

    monkeypatch.setattr(files, "publish", publish)
    with pytest.raises(LowresError, match="No space left") as caught:
        run(wanted, tmp_path / "out", device_name="cpu")
    assert "keeps the run up to step 4 of 18; --resume goes on from there" in caught.value.__notes__[0]
    monkeypatch.undo()
    assert run(wanted, tmp_path / "out", device_name="cpu", resume=True).folder.is_dir()


def test_the_answer_is_yes_unless_it_is_no(wanted: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    interrupted(wanted, tmp_path / "out", 5)
    ours, theirs = pty.openpty()
    with open(os.dup(theirs), "w", encoding="utf-8") as shown, open(theirs, encoding="utf-8") as typed:
        monkeypatch.setattr("sys.stdin", typed)
        monkeypatch.setattr("sys.stderr", shown)
        for answer, goes_on in (("", True), ("y", True), ("n", False)):
            os.write(ours, f"{answer}\n".encode())
            assert recipes._asked(wanted, tmp_path / "out") is goes_on
    os.close(ours)


@pytest.mark.parametrize(("answer", "first"), [("", 5), ("n", 1)])
def test_on_a_terminal_it_is_asked(wanted: Recipe, tmp_path: Path, answer: str, first: int):
    interrupted(wanted, tmp_path / "out", 5)
    (tmp_path / "wanted.yaml").write_text(wanted.to_yaml())
    command = [sys.executable, "-m", "lowres_ft", "recipe", str(tmp_path / "wanted.yaml"), "--device", "cpu"]
    ours, theirs = pty.openpty()
    os.write(ours, f"{answer}\n".encode())
    environment = os.environ | {"COLUMNS": "200"}
    with subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")],
        stdin=theirs,
        stderr=theirs,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        os.close(theirs)
        told = b""
        with suppress(OSError):  # how Linux says that the other end is closed
            while part := os.read(ours, 4096):
                told += part
        assert process.stdout is not None
        printed = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0, told.decode()
    assert b"Go on from step 4 of 18? [Y/n]" in told
    assert (b"going on after step 4 of 18" in told) == (first == 5)
    assert f"bundle {tmp_path / 'out'}" in printed


def test_two_processes_go_on_together(wanted: Recipe, straight: Path, tmp_path: Path):
    """One process began, two go on: the plan changes, the experiment does not."""
    interrupted(wanted, tmp_path / "out", 5)
    (tmp_path / "wanted.yaml").write_text(wanted.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "lowres_ft"]
    command += ["recipe", str(tmp_path / "wanted.yaml"), "--out", str(tmp_path / "out"), "--resume", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes: was 1, is 2" in done.stderr
    from lowres_ft.border import read_adapter

    ours, theirs = (read_adapter(place / "adapter_model.safetensors") for place in (straight, tmp_path / "out"))
    assert all((tensor - theirs[name]).abs().max() < 1e-3 for name, tensor in ours.items())
