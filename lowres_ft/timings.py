"""Choices that were timed on this machine: kept in the cache, so that a second run decides as the first did."""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lowres_ft.device import Machine, versions
from lowres_ft.errors import OutputError
from lowres_ft.files import cache_dir, write_json


def once(machine: Machine, dtype: str, what: str, measure: Callable[[], Any]) -> Any:
    """What `measure` found (plain JSON values) the first time on this machine, with these versions and threads."""
    known = "|".join([machine.host, str(machine.threads), dtype, what, versions()["torch"]])
    path = cache_dir() / "timings" / f"{hashlib.sha256(known.encode()).hexdigest()[:16]}.json"
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        found = measure()
    with suppress(OSError, OutputError):  # what cannot be kept is timed again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    return found
