"""What checkpoints take from training: `python -m benchmarks.checkpoints [--seconds 200] [--out FILE]`.

Each recipe runs twice in this process. First by turns: every sixteenth step begins with a save, so that eight steps
beside it follow eight without one, and what a save takes is the difference. Then as users run it, at the default
rhythm, until time is over: here the seconds are counted in which the training thread saves and in which another one
writes. This counts as much as it can: as though training stood still while it is written. Processor time is told
beside the seconds, because other work on the machine does not change it much.
"""

import argparse
import statistics
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.prepare import machine
from lowres_ft import device, files, pipeline
from lowres_ft.checkpoint import Contents, Record
from lowres_ft.plan import Plan
from lowres_ft.recipe import load_recipe
from lowres_ft.saving import PAUSE, SHARE, Keeper
from lowres_ft.train import TrainState

_BLOCK = 8  # steps
_USUAL = ("sentiment-lora", "train.steps=100000", "train.schedule=constant", "train.evaluate_every=200")
RECIPES: dict[str, tuple[str, ...]] = {
    "LoRA": _USUAL,
    "all weights": (*_USUAL, "method.kind=full", "train.learning_rate=2e-5"),
}


@dataclass(frozen=True)
class Mark:
    """A step is done, and the next has not begun."""

    seconds: float
    processor: float
    tokens: int
    """Of the step before."""
    evaluations: int


@dataclass
class Save:
    """One checkpoint."""

    bytes: int
    beside: bool
    """Written by another thread while training goes on."""
    stopped_seconds: float = 0.0
    """How long the training thread was busy with it."""
    stopped_processor: float = 0.0
    writing_seconds: float = 0.0
    """How long another thread was."""
    writing_processor: float = 0.0


@dataclass
class Watch:
    """What is seen of a run, and when it ends."""

    most_seconds: float
    marks: list[Mark] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    ended: float = 0.0


class Watched(Keeper):
    """Keeps checkpoints as every run does, and takes the time."""

    def __init__(self, watch: Watch, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.watch = watch

    def keep(self, state: TrainState, record: Record, plan: Plan) -> None:
        """Note that a step is done; let it be the last one when time is over."""
        marks = self.watch.marks
        tokens = record.steps[-1].tokens if record.steps else 0
        marks.append(Mark(time.perf_counter(), time.process_time(), tokens, len(record.evaluations)))
        if marks[-1].seconds - marks[0].seconds >= self.watch.most_seconds:
            state.total = state.step
        super().keep(state, record, plan)

    def _save(self, state: TrainState, record: Record, plan: Plan, *, beside: bool) -> None:
        saves, before = self.watch.saves, len(self.watch.saves)
        began, processor = time.perf_counter(), time.thread_time()
        super()._save(state, record, plan, beside=beside)
        self.watch.ended = time.perf_counter()
        if len(saves) > before:
            saves[-1].stopped_seconds = self.watch.ended - began
            saves[-1].stopped_processor = time.thread_time() - processor

    def _write(self, found: Contents, began: float) -> None:
        save = Save(found.bytes, threading.current_thread() is not threading.main_thread())
        self.watch.saves.append(save)
        start, processor = time.perf_counter(), time.thread_time()
        super()._write(found, began)
        if save.beside:
            save.writing_seconds = time.perf_counter() - start
            save.writing_processor = time.thread_time() - processor


def watched(arguments: tuple[str, ...], seconds: float, every: int | str) -> Watch:
    """Run a recipe for some seconds of training."""
    watch = Watch(seconds)
    recipe = load_recipe(arguments[0], [*arguments[1:], f"train.checkpoint_every={every}"])
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(pipeline, "Keeper", partial(Watched, watch)):
        pipeline.run(recipe, Path(folder) / "bundle", device_name="cpu")
    return watch


def by_turns(watch: Watch) -> dict[str, Any]:
    """What a save takes: eight steps that begin with one, less what the tokens of the 16 around them say."""
    marks, extra = watch.marks, []
    for at in range(2 * _BLOCK, len(marks) - 2 * _BLOCK, 2 * _BLOCK):
        before, mine, after = (marks[at + first : at + first + _BLOCK + 1] for first in (-_BLOCK, 0, _BLOCK))
        if before[0].evaluations == after[-1].evaluations:
            extra.append({name: _extra(name, before, mine, after) for name in ("seconds", "processor")})
    told: dict[str, Any] = {"saves": len(extra)}
    for name in ("seconds", "processor"):
        values = [one[name] for one in extra]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        told[name] = {"mean": statistics.fmean(values), "median": statistics.median(values), "error_of_mean": error}
    return told


def _extra(name: str, before: list[Mark], mine: list[Mark], after: list[Mark]) -> float:
    """Seconds of a block beyond those that its tokens take in the blocks around it."""

    def taken(block: list[Mark]) -> float:
        return float(getattr(block[-1], name) - getattr(block[0], name))

    def tokens(block: list[Mark]) -> int:
        return sum(mark.tokens for mark in block[1:])

    usual = (taken(before) + taken(after)) / (tokens(before) + tokens(after))
    return taken(mine) - usual * tokens(mine)


def by_default(watch: Watch) -> dict[str, Any]:
    """Which share of training the saves take, at least and at most."""
    first, last = watch.marks[0], watch.marks[-1]
    seconds = max(watch.ended, last.seconds) - first.seconds
    stopped = sum(save.stopped_seconds for save in watch.saves)
    written = sum(save.writing_seconds for save in watch.saves)
    processor = sum(save.stopped_processor + save.writing_processor for save in watch.saves)
    return {
        "training_seconds": seconds,
        "steps": len(watch.marks) - 1,
        "saves": [asdict(save) for save in watch.saves],
        "share_stopped": stopped / seconds,
        "share_stopped_or_writing": (stopped + written) / seconds,
        "share_of_processor": processor / (last.processor - first.processor),
    }


def measure(name: str, seconds: float, turns: float) -> dict[str, Any]:
    """One recipe, by turns and at the default rhythm; and what the first says of the second."""
    turned = watched(RECIPES[name], turns, 2 * _BLOCK)
    each = [save.stopped_seconds + save.writing_seconds for save in turned.saves]
    extra = by_turns(turned)
    pause = max(PAUSE, SHARE * statistics.median(each))
    return {
        "arguments": list(RECIPES[name]),
        "bytes": turned.saves[-1].bytes,
        "beside": turned.saves[0].beside,
        "a_save": {"seconds": statistics.median(each), "longest": max(each)},
        "by_turns": extra,
        "pause": pause,
        "share_by_turns": extra["seconds"]["mean"] / pause,
        "by_default": by_default(watched(RECIPES[name], seconds, "auto")),
    }


def _line(name: str, found: dict[str, Any]) -> str:
    usual, extra = found["by_default"], found["by_turns"]["seconds"]
    return (
        f"{name:<12} {found['bytes'] / 1e6:>7.1f} MB {found['a_save']['seconds']:>8.3f} s {extra['mean']:>8.3f} s "
        f"{found['pause']:>6.0f} s {found['share_by_turns']:>7.2%} {len(usual['saves']):>6} "
        f"{usual['share_stopped']:>8.2%} {usual['share_stopped_or_writing']:>8.2%} {usual['share_of_processor']:>9.2%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What checkpoints take from training.")
    parser.add_argument("--seconds", type=float, default=200.0, help="Of training at the default rhythm.")
    parser.add_argument("--turns", type=float, default=100.0, help="Seconds of training by turns.")
    parser.add_argument("--only", nargs="*", choices=RECIPES, default=list(RECIPES), help="Some of the recipes.")
    parser.add_argument("--out", type=Path, help="Where to write the record.")
    given = parser.parse_args()
    print(f"{'':<12} {'size':>10} {'a save':>10} {'extra':>10} {'pause':>8} {'share':>7} {'saves':>6} "
          f"{'stopped':>8} {'at most':>8} {'processor':>9}", flush=True)  # fmt: skip
    found: dict[str, Any] = {}
    for name in given.only:
        found[name] = measure(name, given.seconds, given.turns)
        print(_line(name, found[name]), flush=True)
        if given.out:
            files.write_json(given.out, {"machine": machine("cpu"), "versions": device.versions(), "runs": found})


if __name__ == "__main__":
    main()
