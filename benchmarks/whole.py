"""One whole run in a process of its own, as users run it.

`python -m benchmarks.whole BASE ROWS TASK LENGTH OUT [CHANGES ...]`

The bundle comes to OUT; OUT.jsonl tells the resident bytes at each stage, now and at most so far, and the seconds of
each step. Nothing heavy is imported before the command line would.
"""

import json
import sys
from pathlib import Path
from typing import Any, TextIO

_BOUND = "budget.memory="


def main(job: list[str], log: TextIO) -> None:
    """Run what a job says."""
    from lowres_ft import deferred, limits

    base, rows, task, length, out, *changes = job
    bound = [change.removeprefix(_BOUND) for change in changes if change.startswith(_BOUND)]
    limits.expect(bound[0] if bound else None)  # this and the next as the command line does
    deferred.begin()
    import lowres_ft
    from benchmarks import shapes
    from lowres_ft import allocator, device
    from lowres_ft.events import Event, Stage, Trained

    def listen(event: Event) -> None:
        found: dict[str, Any] = {}
        if isinstance(event, Stage):
            found = {"stage": event.text, "now": allocator.resident(), "peak": device.peak_bytes("cpu")}
        elif isinstance(event, Trained):
            found = {"seconds": event.step.seconds}
        if found:
            print(json.dumps(found), file=log)

    lowres_ft.run(shapes.recipe(Path(base), Path(rows), task, int(length), *changes), out, listen=listen)


if __name__ == "__main__":
    with open(f"{sys.argv[5]}.jsonl", "w", encoding="utf-8") as log:
        main(sys.argv[1:], log)
