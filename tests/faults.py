"""Writing that fails: the i-th open, write, fsync, rename of a short run, and a disk that is full at byte k.

`python -m tests.faults` tries every i and 50 values of k. A run that fails must do so with one LowresError, and what
stood before, or what it wrote, must load: resumed without faults, it ends in the bytes of an undisturbed run.
"""

import argparse
import builtins
import errno
import gc
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch

from lowres_ft import checkpoint
from lowres_ft.bundle import open_bundle
from lowres_ft.errors import LowresError
from lowres_ft.pipeline import run
from lowres_ft.recipe import Recipe
from tests import tiny
from tests.conftest import recipe

FUNCTIONS = ("open", "write", "fsync", "rename")
_CHANGES = ("train.steps=4", "train.evaluate_every=2", "train.checkpoint_every=2", "data.test=null")


class Faults:
    """Counts the calls of one kind that concern a folder, and lets one of them fail."""

    def __init__(self, folder: Path, kind: str, failing: int | None) -> None:
        self.folder, self.kind, self.failing = str(folder), kind, failing
        self.count = 0

    def hit(self, path: object) -> None:
        """One more call."""
        if isinstance(path, str | os.PathLike) and str(path).startswith(self.folder):
            if self.count == self.failing:
                self.count += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.count += 1

    @contextmanager
    def injected(self) -> Iterator[None]:
        """While this lasts, calls are counted."""
        real = {name: getattr(os, name) for name in ("fsync", "replace", "rename")}
        real_open = builtins.open

        def opened(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            writes = isinstance(mode, str) and set(mode) & set("wxa+")
            if writes and self.kind == "open":
                self.hit(path)
            file = real_open(path, mode, *arguments, **options)
            return _Failing(file, self, path) if writes and self.kind == "write" and "b" in mode else file

        def synced(handle: int) -> None:
            self.hit(os.readlink(f"/proc/self/fd/{handle}"))
            real["fsync"](handle)

        def moved(name: str) -> Callable[..., None]:
            def move(source: Any, target: Any, **options: Any) -> None:
                self.hit(target)
                real[name](source, target, **options)

            return move

        builtins.open = opened  # type: ignore[assignment]
        if self.kind == "fsync":
            os.fsync = synced  # type: ignore[assignment]
        if self.kind == "rename":
            os.replace, os.rename = moved("replace"), moved("rename")  # type: ignore[assignment]
        try:
            yield
        finally:
            builtins.open = real_open
            os.fsync, os.replace, os.rename = real["fsync"], real["replace"], real["rename"]


class _Failing:
    """A file whose writes are counted."""

    def __init__(self, file: Any, faults: Faults, path: object) -> None:
        self.file, self.faults, self.path = file, faults, path

    def write(self, data: bytes) -> int:
        self.faults.hit(self.path)
        return int(self.file.write(data))

    def writelines(self, parts: Sequence[bytes]) -> None:
        for part in parts:
            self.write(part)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@contextmanager
def full_at(size: int) -> Iterator[None]:
    """No file can grow beyond some bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Setting:
    """A tiny recipe, and the bytes that it must end in."""

    def __init__(self, room: Path) -> None:
        self.room = room
        self.recipe: Recipe = recipe(tiny.base(room / "base"), tiny.reviews(room / "rows.csv"), *_CHANGES)
        run(self.recipe, room / "straight", device_name="cpu")
        self.adapter = (room / "straight" / "adapter_model.safetensors").read_bytes()
        self.largest = max(path.stat().st_size for path in (room / "straight").iterdir())

    def calls(self, kind: str) -> int:
        """How many calls of a kind a run makes."""
        faults = Faults(self.room / "counted", kind, None)
        with faults.injected():
            run(self.recipe, self.room / "counted", device_name="cpu")
        shutil.rmtree(self.room / "counted")
        return faults.count

    def fail(self, kind: str, failing: int) -> str | None:
        """Let one call fail; return what is wrong then."""
        return self._tried(Faults(self.room / "out", kind, failing).injected())

    def fill(self, size: int) -> str | None:
        """Let the disk be full at a byte; return what is wrong then."""
        return self._tried(full_at(size))

    def _tried(self, fault: Any) -> str | None:
        out = self.room / "out"
        try:
            with fault:
                run(self.recipe, out, device_name="cpu")
        except LowresError as error:
            if "\n" in error.message or not error.hint:
                return f"not one error with a hint: {error.message}"
        except Exception as error:  # noqa: BLE001 (that is what is looked for)
            return f"{type(error).__name__}: {error}"
        _, damaged = checkpoint.newest(self.room / "out.run" / "checkpoints")
        if damaged:
            return damaged[0]
        run(self.recipe, out, device_name="cpu", resume=True)
        open_bundle(out)
        same = (out / "adapter_model.safetensors").read_bytes() == self.adapter
        left = sorted(path.name for path in self.room.glob("out?*")) + sorted(path.name for path in out.glob(".*"))
        shutil.rmtree(out)
        return None if same and not left else f"other bytes, or left behind: {left}"


def main(arguments: list[str] | None = None) -> int:
    """Try every fault; print a line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="try each n-th fault only")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    gc.freeze()  # as the command line does
    wrong = []
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        os.environ["LOWRES_FT_CACHE"] = str(Path(name) / "cache")
        setting = Setting(Path(name))
        for kind in FUNCTIONS:
            tried = range(0, setting.calls(kind), given.every)
            found = [(f"{kind} {at}", setting.fail(kind, at)) for at in tried]
            wrong += [f"{what}: {one}" for what, one in found if one]
            print(f"{kind:<8} {len(tried):>4} faults, {sum(one is not None for _, one in found)} wrong", flush=True)
        sizes = [setting.largest * at // 50 for at in range(0, 50, given.every)]
        found = [(f"full at {size}", setting.fill(size)) for size in sizes]
        wrong += [f"{what}: {one}" for what, one in found if one]
        print(f"{'full':<8} {len(sizes):>4} sizes, {sum(one is not None for _, one in found)} wrong")
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
