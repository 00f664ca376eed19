"""SIGINT and SIGTERM: what is half done waits, what is saved goes on, and a second one harms nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lowres_ft import stopping
from lowres_ft.pipeline import run
from lowres_ft.recipe import Recipe
from lowres_ft.stopping import Stopped, check, deferred
from tests.conftest import recipe

Bases = Callable[..., Path]


@pytest.fixture
def heard() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    stopping.install()
    yield
    stopping.install()
    for number, handler in before.items():
        signal.signal(number, handler)


EARLY = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, *_):
        if name == "lowres_ft.cli.main":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from lowres_ft.__main__ import main
main()
"""


def test_a_signal_while_the_command_line_is_imported_leaves_no_traceback():
    done = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.usefixtures("heard")
def test_a_signal_stops_at_once():
    with pytest.raises(Stopped) as caught:
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143


@pytest.mark.usefixtures("heard")
def test_what_is_deferred_is_done_first():
    done = []

    def work() -> None:
        with deferred():
            with deferred():
                os.kill(os.getpid(), signal.SIGINT)
                done.append("inner")
            done.append("outer")

    with pytest.raises(Stopped) as caught:
        work()
    assert done == ["inner", "outer"]
    assert caught.value.code == 130


@pytest.mark.usefixtures("heard")
def test_a_check_stops_within():
    done = []

    def work() -> None:
        with deferred():
            check()
            os.kill(os.getpid(), signal.SIGINT)
            check()
            done.append("beyond")

    with pytest.raises(Stopped):
        work()
    assert not done


@pytest.mark.usefixtures("heard")
def test_other_errors_are_left_as_they_are():
    with pytest.raises(RuntimeError, match="a bug"), deferred():
        raise RuntimeError("a bug")


def test_a_second_signal_ends_the_process():
    code = (
        "import os, signal, sys; from lowres_ft import stopping; stopping.install()\n"
        "with stopping.deferred():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('once', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT); print('twice', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "once\n", "")


@pytest.fixture
def long(bases: Bases, reviews: Path) -> Recipe:
    return recipe(bases(), reviews, "train.steps=3000", "train.checkpoint_every=none", "method.dropout=0.1")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_last_whole_step(long: Recipe, tmp_path: Path, number: signal.Signals, code: int):
    place = tmp_path / "long.yaml"
    place.write_text(long.to_yaml())
    command = [sys.executable, "-m", "lowres_ft", "recipe", str(place), "--out", str(tmp_path / "out")]
    command += ["--device", "cpu", "--quiet"]
    metrics = tmp_path / "out.run" / "metrics.jsonl"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as one:
        while one.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") > 5):
            time.sleep(0.02)
        one.send_signal(number)
        _, err = one.communicate(timeout=60)
    assert one.returncode == code, err
    (kept,) = (tmp_path / "out.run" / "checkpoints").iterdir()
    state = json.loads((kept / "state.json").read_text())
    numbers = [json.loads(line)["number"] for line in metrics.read_text().splitlines() if "loss" in line]
    assert state["step"] == numbers[-1]
    kept_until = f"step {state['step']} of 3000; --resume goes on from there"
    told = f"no bundle was written; {tmp_path / 'out.run'} keeps the run up to {kept_until}"
    assert err.splitlines() == ["interrupted", told]
    assert sorted(path.name for path in (tmp_path / "out.run").iterdir()) == [
        *("checkpoints", "lock", "metrics.jsonl", "plan.json", "run.json"),
    ]


IN_AN_EVALUATION = """
import os, resource, signal, sys, threading, time
from lowres_ft import checkpoint, evaluate, train
from lowres_ft.cli.main import main

steps, sent, before = [], [], resource.getrlimit(resource.RLIMIT_DATA)
values, step, save = evaluate._values, train._step, checkpoint.save

def slow(*arguments):
    if len(steps) > 3 and not sent:
        sent.append(threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start())
        time.sleep(0.5)
    return values(*arguments)

def counted(*arguments):
    steps.append(step(*arguments))
    return steps[-1]

def unbounded(*arguments):
    print("unbounded", resource.getrlimit(resource.RLIMIT_DATA) == before, flush=True)
    return save(*arguments)

evaluate._values, train._step, checkpoint.save = slow, counted, unbounded
sys.argv[0] = "lowres-ft"
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a process is held to a bound on Linux alone")
def test_a_signal_in_an_evaluation_under_a_bound_saves_the_last_step(long: Recipe, tmp_path: Path):
    place = tmp_path / "long.yaml"
    place.write_text(long.to_yaml())
    command = [sys.executable, "-c", IN_AN_EVALUATION, "recipe", str(place), "--out", str(tmp_path / "out")]
    command += ["--device", "cpu", "--quiet", "budget.memory=4GiB", "budget.probe=false", "train.evaluate_every=4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "unbounded True\n"), done.stderr
    assert done.stderr.startswith("interrupted\n")
    assert len(done.stderr.splitlines()) == 2  # and what is kept
    (kept,) = (tmp_path / "out.run" / "checkpoints").iterdir()
    assert json.loads((kept / "state.json").read_text())["step"] == 4


@pytest.mark.usefixtures("heard")
def test_a_run_stopped_in_a_step_and_in_an_evaluation_goes_on_to_the_same_bytes(
    bases: Bases, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from lowres_ft import attempt, evaluate

    changes = ("train.evaluate_every=3", "train.checkpoint_every=none", "budget.probe=false")
    wanted = recipe(bases(), reviews, "train.steps=9", *changes)
    straight = run(wanted, tmp_path / "straight", device_name="cpu")

    def stopped_in(module: object, name: str, call: int) -> None:
        real, calls = getattr(module, name), []

        def counted(*arguments: object, **options: object) -> object:
            calls.append(name)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGINT)
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, counted)
        stopping.install()
        with pytest.raises(Stopped):
            run(wanted, tmp_path / "out", device_name="cpu", resume=True)
        monkeypatch.undo()

    stopped_in(attempt, "_backward", 2)
    names = []
    for module, name, call in ((evaluate, "outputs", 1), (attempt, "_update", 2)):
        stopped_in(module, name, call)
        names += [path.name for path in (tmp_path / "out.run" / "checkpoints").iterdir()]
    assert "00000003-00000" in names  # before its evaluation
    stopping.install()
    resumed = run(wanted, tmp_path / "out", device_name="cpu", resume=True)
    name = "adapter_model.safetensors"
    assert (resumed.folder / name).read_bytes() == (straight.folder / name).read_bytes()
    reports = [json.loads((bundle.folder / "report.json").read_text()) for bundle in (straight, resumed)]
    assert reports[0]["curves"] == reports[1]["curves"]
