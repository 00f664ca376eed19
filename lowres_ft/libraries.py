"""Libraries that do something by the way when they are imported, imported without it.

Where the package `kernels` is installed, bitsandbytes fetches native code from the Hub as it is imported, and PEFT
imports bitsandbytes. No network call may happen unasked. bitsandbytes has functions compiled as it is imported, which
brings PyTorch's compiler into memory whether one of them is called or not.
"""

import importlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial, wraps
from types import ModuleType
from typing import Any


def peft() -> ModuleType:
    """The module peft."""
    with _without_kernels(), _compiled_later():
        return importlib.import_module("peft")


def bitsandbytes() -> ModuleType:
    """The module bitsandbytes.

    Raises:
        ImportError: It is not installed.
    """
    with _without_kernels(), _compiled_later():
        return importlib.import_module("bitsandbytes")


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep the Hub's client from drawing progress bars and telling every retry."""
    from huggingface_hub import utils

    bars = not utils.are_progress_bars_disabled()  # type: ignore[attr-defined]  # exported, but not in __all__
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    utils.disable_progress_bars()  # type: ignore[attr-defined]
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            utils.enable_progress_bars()  # type: ignore[attr-defined]


@contextmanager
def silent() -> Iterator[None]:
    """Keep what compiled code writes past Python off the terminal: panics, and names in files, which may act there."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # there is none, or it is closed
            stream.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    kept: list[tuple[int, int]] = []
    try:
        for number in (1, 2):
            with suppress(OSError):
                kept.append((number, os.dup(number)))
                os.dup2(nowhere, number)
        yield
    finally:
        for number, real in kept:
            os.dup2(real, number)
            os.close(real)
        os.close(nowhere)


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Make `import kernels` fail, and keep bitsandbytes' complaint about that to itself."""
    if "bitsandbytes" in sys.modules:
        yield
        return
    kernels = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # what makes an import fail
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.modules.pop("kernels", None)
        if kernels is not None:
            sys.modules["kernels"] = kernels


@contextmanager
def _compiled_later() -> Iterator[None]:
    """Let what is compiled be so when it is first called."""
    if "bitsandbytes" in sys.modules:
        yield
        return
    import torch

    compile_now: Any = torch.compile

    def later(function: Any = None, **options: Any) -> Any:
        if function is None:
            return partial(later, **options)
        compiled = cache(lambda: compile_now(function, **options))

        @wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            return compiled()(*args, **named)

        return call

    torch.compile = later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now
