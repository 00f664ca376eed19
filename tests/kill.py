"""Runs killed with SIGKILL at random moments, resumed until they are done: `python -m tests.kill`.

A parent that has imported the libraries, and computed nothing, forks each run. A run tells by a pipe which phase it is
in: loading, a step, saving, evaluating or bundling; the moment of a kill is drawn uniformly within a phase. Each fourth
run is killed twice, and one in ten is the real command line, killed at any moment. Afterwards the adapter must have the
bytes of an undisturbed run, and nothing may be left beside the bundle.

So that every phase is hit, runs save every third step. With `--rhythm auto` they save as they do by default, once a
minute. A pause in each step makes them long enough for that; two of three are killed at any moment of their life, the
third while it saves.
"""

import argparse
import collections
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowres_ft import attempt, checkpoint, fitting
from lowres_ft.bundle import open_bundle
from lowres_ft.events import Event, Stage
from lowres_ft.pipeline import run
from lowres_ft.recipe import Recipe
from tests import test_ner_runs, tiny, tiny_chat
from tests.conftest import recipe

TASKS = ("classification", "ner", "chat")
COMMAND = "any (command line)"
PHASES = {"L": "loading", "T": "a step", "S": "saving", "E": "evaluating", "B": "bundling"}
_DEEPEST = "SETBL"
_COMMON = ("method.dropout=0.1", "train.seed=11")


@dataclass(frozen=True)
class Rhythm:
    """How often runs save, and how long they are."""

    changes: tuple[str, ...]
    pause: float = 0.0
    """Seconds that each step sleeps."""


RHYTHMS = {
    "steps": Rhythm(
        (
            *("train.steps=null", "train.epochs=3", "train.evaluate_every=4", "train.early_stopping.patience=3"),
            "train.checkpoint_every=3",
        )
    ),
    "auto": Rhythm(
        (
            *("train.steps=450", "train.evaluate_every=50", "train.early_stopping.patience=7"),
            "train.checkpoint_every=auto",
        ),
        pause=0.18,
    ),
}


def wanted(task: str, room: Path, rhythm: Rhythm) -> Recipe:
    """The recipe of a task; dropout is on, there are several epochs, and training may stop early."""
    base, rows, changes = room / f"{task}-base", room / f"{task}-rows", (*_COMMON, *rhythm.changes)
    if task == "chat":
        return tiny_chat.recipe(base, rows.with_suffix(".jsonl"), *changes)
    if task == "ner":
        return test_ner_runs.recipe(base, rows.with_suffix(".conll"), *changes, "data.limit=60", "task.max_length=16")
    return recipe(base, rows.with_suffix(".csv"), *changes)


def build(task: str, room: Path) -> None:
    """Write base and rows."""
    base, rows = room / f"{task}-base", room / f"{task}-rows"
    if task == "chat":
        tiny_chat.base(base)
        tiny_chat.chats(rows.with_suffix(".jsonl"))
    elif task == "ner":
        tiny.base(base)
        blocks = ("\n".join(map(" ".join, zip(*one, strict=True))) for one in test_ner_runs.sentences())
        rows.with_suffix(".conll").write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    else:
        tiny.base(base)
        tiny.reviews(rows.with_suffix(".csv"))


@dataclass
class Child:
    """A process that runs a recipe and tells its phases: a capital letter as one begins, a small one as it ends."""

    pid: int
    pipe: int
    heard: list[tuple[float, str]] = field(default_factory=list)

    def listen(self, seconds: float) -> bool:
        """Take in what it tells within some time; False once it has ended."""
        if not select.select([self.pipe], [], [], max(0.0, seconds))[0]:
            return True
        told = os.read(self.pipe, 4096)
        self.heard += [(time.monotonic(), letter) for letter in told.decode()]
        return bool(told)

    def end(self) -> int:
        """Wait for its end; return its code, negative for a signal."""
        while self.listen(60):
            pass
        os.close(self.pipe)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def phase(self) -> str:
        """The innermost phase that it was in at last."""
        open_ = collections.Counter()
        for _, letter in self.heard:
            open_[letter.upper()] += 1 if letter.isupper() else -1
        return next((PHASES[letter] for letter in _DEEPEST if open_[letter] > 0), "loading")


def fork(work: Callable[[Callable[[str], None]], None], log: Path) -> Child:
    """Start `work` in a child; what it gets is the way to tell a phase."""
    mine, theirs = os.pipe()
    pid = os.fork()
    if pid:
        os.close(theirs)
        return Child(pid, mine)
    code = 1
    try:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        torch.set_num_threads(1)
        work(lambda letter: os.write(theirs, letter.encode()) and None)
        code = 0
    except BaseException:  # noqa: BLE001 (told, and the parent sees the code)
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def running(recipe: Recipe, out: Path, tell: Callable[[str], None], pause: float) -> None:
    """Run a recipe, telling phases; each step sleeps `pause` seconds once it is computed."""

    @contextmanager
    def phase(letter: str) -> Iterator[None]:
        tell(letter)
        yield
        tell(letter.lower())

    def wrap(module: Any, name: str, letter: str) -> None:
        real = getattr(module, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            with phase(letter):
                return real(*arguments, **options)

        setattr(module, name, wrapped)

    def listen(event: Event) -> None:
        if isinstance(event, Stage) and event.text.startswith("training on"):
            tell("l")
        if isinstance(event, Stage) and event.text.startswith("scoring"):
            tell("B")

    wrap(checkpoint, "save", "S")
    wrap(fitting, "_evaluate", "E")
    wrap(attempt.Attempt, "gradient", "T")
    if pause:
        update = attempt._update

        def paused(*arguments: Any, **options: Any) -> Any:
            norm = update(*arguments, **options)
            time.sleep(pause)
            return norm

        attempt._update = paused
    wrap(attempt, "_update", "T")
    tell("L")
    run(recipe, out, device_name="cpu", listen=listen, resume=True)


def spans(heard: list[tuple[float, str]]) -> dict[str, list[float]]:
    """How long each occurrence of each phase took."""
    found: dict[str, list[float]] = {letter: [] for letter in PHASES}
    begun: dict[str, float] = {}
    for when, letter in heard:
        if letter.isupper():
            begun[letter] = when
        else:
            found[letter.upper()].append(when - begun.pop(letter.upper()))
    for letter, when in begun.items():
        found[letter].append(heard[-1][0] - when)
    return found


def kill(child: Child, letter: str | None, occurrence: int, delay: float) -> str | None:
    """Kill a child in an occurrence of a phase, or of any sign of life; return the phase that it was in.

    None where it ended before.
    """
    due = None
    while due is None or time.monotonic() < due:
        if not child.listen(60 if due is None else due - time.monotonic()):
            if code := child.end():
                raise ChildProcessError(f"a run that nobody killed ended with {code}")
            return None
        begins = [when for when, told in child.heard if letter in (told, None)]
        if due is None and len(begins) > occurrence:
            due = begins[occurrence] + delay
    os.kill(child.pid, signal.SIGKILL)
    code = child.end()
    return child.phase() if code == -signal.SIGKILL else None


@dataclass
class Straight:
    """An undisturbed run."""

    recipe: Recipe
    adapter: bytes
    spans: dict[str, list[float]]
    signs: int
    """How often it told a phase."""
    seconds: float
    pause: float


class Trial:
    """One run, killed and resumed until it is done."""

    def __init__(self, straight: Straight, room: Path, drawn: random.Random) -> None:
        self.straight, self.room, self.drawn = straight, room, drawn
        self.out = room / "out"
        self.killed: list[str] = []
        self.wrong: list[str] = []

    def start(self) -> Child:
        straight = self.straight
        return fork(lambda tell: running(straight.recipe, self.out, tell, straight.pause), self.room / "log")

    def moment(self, letter: str | None) -> tuple[int, float]:
        """An occurrence of a phase and a time in it; else a sign of life, which are the denser the busier a run is."""
        if letter is None:
            most = self.straight.signs if not self.killed else self.straight.signs // 3
            return self.drawn.randrange(most), self.drawn.random() * self.straight.pause
        times = self.straight.spans[letter]
        occurrence = self.drawn.randrange(len(times)) if not self.killed else 0
        return occurrence, self.drawn.random() * times[occurrence]

    def kill_in(self, letter: str | None) -> bool:
        """Kill the run in a phase, or at any moment, drawing which; False where it was done before."""
        try:
            phase = kill(self.start(), letter, *self.moment(letter))
        except ChildProcessError as error:
            raise SystemExit(f"{error}:\n{(self.room / 'log').read_text()[-2000:]}") from None
        if phase:
            self.killed.append(phase)
            self.look()
        return phase is not None

    def kill_command(self) -> None:
        """The same with the real command line, at any moment of its life."""
        (self.room / "wanted.yaml").write_text(self.straight.recipe.to_yaml())
        command = [sys.executable, "-m", "lowres_ft", "recipe", str(self.room / "wanted.yaml"), "--resume", "--quiet"]
        command += ["--out", str(self.out), "--device", "cpu", "--json"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
            time.sleep(self.drawn.uniform(0.3, 1.2) * (self.straight.seconds + 5))
            process.kill()
        self.killed.append(COMMAND)
        self.look()

    def look(self) -> None:
        """No checkpoint may be half written."""
        _, damaged = checkpoint.newest(self.out.with_name("out.run") / "checkpoints")
        self.wrong += damaged

    def finish(self) -> None:
        """Resume to the end and compare."""
        if self.start().end() != 0:
            self.wrong.append(f"it did not resume: {(self.room / 'log').read_text()[-2000:]}")
            return
        open_bundle(self.out)
        if (self.out / "adapter_model.safetensors").read_bytes() != self.straight.adapter:
            self.wrong.append("the adapter is another one")
        left = {path.name for path in self.room.iterdir()} - {"out", "log", "wanted.yaml"}
        left |= {path.name for path in self.out.iterdir() if path.name.startswith(".")}
        self.wrong += [f"left behind: {name}" for name in sorted(left)]


def undisturbed(task: str, room: Path, rhythm: Rhythm) -> Straight:
    """Build what a task needs, and run it once."""
    if fork(lambda _: build(task, room), room / "log").end():
        raise SystemExit((room / "log").read_text())
    recipe, out = wanted(task, room, rhythm), room / f"{task}-straight"
    began = time.monotonic()
    child = fork(lambda tell: running(recipe, out, tell, rhythm.pause), room / "log")
    if child.end():
        raise SystemExit((room / "log").read_text())
    seconds = time.monotonic() - began
    found = spans(child.heard)
    print(f"{task}: {seconds:.0f} seconds undisturbed, saved {len(found['S'])} times", file=sys.stderr, flush=True)
    adapter = (out / "adapter_model.safetensors").read_bytes()
    return Straight(recipe, adapter, found, len(child.heard), seconds, rhythm.pause)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--rhythm", choices=RHYTHMS, default="steps")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    drawn = random.Random(given.seed)
    tasks = (given.task,) if given.task else TASKS
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    wrong: list[str] = []
    twice = 0
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        room = Path(name)
        os.environ["LOWRES_FT_CACHE"] = str(room / "cache")
        straight = {task: undisturbed(task, room, RHYTHMS[given.rhythm]) for task in tasks}
        for number in range(given.runs):
            task = tasks[number % len(tasks)]
            place = room / f"run-{number}"
            place.mkdir()
            trial = Trial(straight[task], place, drawn)
            first, again = chosen(number, number // len(tasks), given.rhythm, counts, drawn)
            if first == COMMAND:
                trial.kill_command()
            else:
                while not trial.kill_in(first):
                    shutil.rmtree(place)
                    place.mkdir()
                if number % 4 == 3:
                    twice += trial.kill_in(again)
            trial.finish()
            counts.update((phase, task) for phase in trial.killed)
            done = f"run {number + 1}: {task}, killed in {', '.join(trial.killed)}"
            wrong += [f"{done}: {one}" for one in trial.wrong]
            shutil.rmtree(place)
            print(done, *trial.wrong, sep="; ", file=sys.stderr, flush=True)
        litter = [path for path in (room / "cache").rglob("*") if path.name.endswith((".tmp", ".partial"))]
        wrong += [f"left in the cache: {path.name}" for path in litter]
    print(table(counts, tasks))
    print(f"{given.runs} runs, {sum(counts.values())} kills, {twice} runs killed twice, {len(wrong)} wrong")
    print(*wrong, sep="\n")
    return 1 if wrong else 0


def chosen(
    number: int, of_task: int, rhythm: str, counts: collections.Counter[tuple[str, str]], drawn: random.Random
) -> tuple[str | None, str | None]:
    """Where a run is killed, and where again if it is: a phase's letter, None for any moment, or COMMAND."""
    if rhythm == "auto":
        return ("S" if of_task % 3 == 2 else None), None
    if number % 10 == 9:
        return COMMAND, None
    rarest = min(PHASES, key=lambda letter: sum(counts[PHASES[letter], one] for one in TASKS))
    return rarest, drawn.choice(list(PHASES)) if number % 4 == 3 else None


def table(counts: collections.Counter[tuple[str, str]], tasks: tuple[str, ...]) -> str:
    """Kills by phase and task."""
    phases = [*PHASES.values(), COMMAND]
    lines = [f"{'killed in':<20}" + "".join(f"{task:>16}" for task in tasks) + f"{'all':>8}"]
    for phase in phases:
        found = [counts[phase, task] for task in tasks]
        lines.append(f"{phase:<20}" + "".join(f"{count:>16}" for count in found) + f"{sum(found):>8}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
