"""Facts in data: what was fitted by measuring, devices, versions of libraries, and bases."""

import json
from pathlib import Path
from typing import Any


def read(name: str) -> Any:
    """The content of a table."""
    return json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))
