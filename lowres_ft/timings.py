"""Choices that were timed on this machine: kept in the cache, so that a second run decides as the first did."""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil

from lowres_ft.device import Machine, versions
from lowres_ft.errors import OutputError
from lowres_ft.files import cache_dir, write_json

_OTHERS = 0.15  # of the processor's time, from which other work spoils a measurement


def once(machine: Machine, dtype: str, what: str, measure: Callable[[], Any], *, alone: bool = False) -> Any:
    """What `measure` found (plain JSON values) the first time on this machine, with these versions and threads.

    What asks to be `alone` is not kept where other work had a share of the processor meanwhile.
    """
    known = "|".join([machine.host, str(machine.threads), dtype, what, versions()["torch"]])
    path = cache_dir() / "timings" / f"{hashlib.sha256(known.encode()).hexdigest()[:16]}.json"
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        began, others = time.monotonic(), _others()
        found = measure()
    if alone and _others() - others > _OTHERS * (time.monotonic() - began) * psutil.cpu_count():
        return found
    with suppress(OSError, OutputError):  # what cannot be kept is timed again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    return found


def _others() -> float:
    """Seconds that processors have spent on all but this process."""
    spent = psutil.cpu_times()
    return float(sum(spent) - spent.idle - getattr(spent, "iowait", 0.0) - time.process_time())
