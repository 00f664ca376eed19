"""When a run saves where it stands: now and then beside training, at its end, and when a signal stops it."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from lowres_ft import checkpoint, device, limits, stopping
from lowres_ft.checkpoint import Checkpoint, Contents, Record
from lowres_ft.plan import Plan
from lowres_ft.sizes import parse_seconds
from lowres_ft.stopping import Stopped
from lowres_ft.train import Step, TrainState

_BESIDE = 256 * 2**20  # bytes that are copied, to be written while training goes on
SHARE = 120
"""Times as long as a save takes, training goes on before the next: less than 1 %."""
PAUSE = 60.0
"""Seconds between two saves, at the least."""
_SPEED = 200e6  # bytes a second, until one was measured
_SLACK = 64 * 2**20  # bytes of tokenizer, report and page


class Keeper:
    """Keeps the checkpoints of a run. Without a folder it only counts, and with `writes=False` it only reads."""

    def __init__(
        self,
        folder: Path | None = None,
        every: int | str = "none",
        found: Checkpoint | None = None,
        *,
        writes: bool = True,
    ) -> None:
        self.folder = folder if writes else None
        self.every = "none" if every == "off" else every
        self.found = found
        self.cost = 0.0
        self.began = time.monotonic()
        self.saved = ""
        self.thread: threading.Thread | None = None
        self.failed: BaseException | None = None

    def begin(self, state: TrainState, plan: Plan, log: TextIO) -> Record:
        """Put a new state where the run goes on; `log` gets the lines of what was done until then.

        Raises:
            OutputError: There is not the room to save it.
        """
        record = Record()
        if self.found is not None:
            record = checkpoint.load(self.found, state, plan)
            self.saved = self.found.folder.name
            evaluations = dict(record.evaluations)
            for step in record.steps:
                log.write(json.dumps(asdict(step)) + "\n")
                if step.number in evaluations:
                    log.write(
                        json.dumps({"number": step.number, state.adapted.task.metric: evaluations[step.number]}) + "\n"
                    )
        if self.folder is not None:
            bundle = sum(tensor.nbytes for tensor in state.adapted.tensors().values())
            whole = 4 * bundle  # weights, the optimizer's two moments and the best step's
            self.cost = whole / _SPEED
            kept = 1 if self.every == "none" else 3  # two, and one that is being written
            checkpoint.require_room(self.folder.parent, bundle + kept * whole + _SLACK)
        self.began = time.monotonic()
        return record

    def taken(self, steps: Iterator[Step], record: Record, log: TextIO) -> Iterator[Step]:
        """Steps as they are done; a signal comes between them, when each is recorded."""
        while True:
            with stopping.deferred():
                step = next(steps, None)
                if step is None:
                    return
                record.steps.append(step)
                log.write(json.dumps(asdict(step)) + "\n")
            yield step

    @contextmanager
    def watching(self, state: TrainState, record: Record, plan: Plan) -> Iterator[None]:
        """Save the last whole step where a signal stops what is inside; at its end, if that is worth it."""
        try:
            yield
            if self._last_too():
                self._save(state, record, plan, beside=False)
        except Stopped:
            self._save(state, record, plan, beside=False)
            raise
        finally:
            self._wait()

    def keep(self, state: TrainState, record: Record, plan: Plan) -> None:
        """Save after a step, if it is time.

        Raises:
            OutputError: This one or the one before could not be written.
        """
        self._tell()
        if self.folder is not None and state.step and self._due(state.step):
            self._save(state, record, plan, beside=True)

    def _due(self, step: int) -> bool:
        if isinstance(self.every, int):
            return step % self.every == 0
        if self.every == "none" or (self.thread is not None and self.thread.is_alive()):
            return False
        pause = max(PAUSE, SHARE * self.cost) if self.every == "auto" else parse_seconds(self.every)
        return time.monotonic() - self.began >= pause

    def _last_too(self) -> bool:
        """Whether the end of training is saved, for what comes after it: `auto` leaves out what would cost too much."""
        self._wait()
        return self.every != "none" and (self.every != "auto" or time.monotonic() - self.began >= SHARE * self.cost)

    def _save(self, state: TrainState, record: Record, plan: Plan, *, beside: bool) -> None:
        if self.folder is None or not state.step:
            return
        self._wait()
        self._tell()
        with stopping.deferred():
            began = time.monotonic()
            record.peak_bytes = max(record.peak_bytes, device.peak_bytes(plan.device))
            found = checkpoint.contents(state, record, plan)
            if found.name == self.saved:
                return
            self.saved = found.name
            # A bound of memory, while one is held, would stand for a thread beside, too.
            if beside and found.bytes < _BESIDE and not limits.held_now():
                self.thread = threading.Thread(target=self._write, args=(found.copied(), began))
                self.thread.start()
            else:
                self._write(found, began)
        self._tell()

    def _write(self, found: Contents, began: float) -> None:
        assert self.folder is not None
        try:
            checkpoint.save(found, self.folder)
        except BaseException as error:  # noqa: BLE001 (raised where training can be stopped)
            self.failed = error
        self.began = time.monotonic()
        self.cost = self.began - began

    def _wait(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _tell(self) -> None:
        """Raise what went wrong in writing."""
        if self.failed is not None:
            failed, self.failed = self.failed, None
            raise failed
