"""One run in a process of its own, its layers resident or passing: `python -m benchmarks.streamed JOB.json`.

It trains a few steps and evaluates, and writes losses, seconds and what it read from the disk. With `cold` the pages of
a layer leave the system's cache too as it is given back, as they would on a machine that has no memory to cache with.
"""

import hashlib
import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

_PAGEOUT = 21  # MADV_PAGEOUT of Linux, which Python's mmap does not name


def read_bytes() -> int:
    """Bytes that this process had the disk read."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def leave_no_cache() -> None:
    """Let each block leave the system's cache too as it is dropped; what the disk does not have yet cannot."""
    from lowres_ft.mapped import Block

    dropped = Block.drop

    def drop(block: Block) -> None:
        block.map.madvise(_PAGEOUT)
        dropped(block)

    Block.drop = drop  # type: ignore[method-assign,assignment]


def pages(size: int = 90 * 2**20, count: int = 12) -> float:
    """Bytes a second of blocks as large as layers that come from the disk in turn, while nothing computes."""
    leave_no_cache()
    import torch

    from lowres_ft import mapped
    from lowres_ft.mapped import Need

    room = Need(torch.Size([size]), torch.uint8)
    blocks = mapped.blocks([[room]] * count)
    tensors = [block.tensor(room).random_() for block in blocks]
    for block in blocks:
        block.map.flush()
        block.drop()
    before, began = read_bytes(), time.perf_counter()
    for at, tensor in enumerate(tensors):
        blocks[(at + 1) % count].ahead()
        tensor[:: 2**12].sum()
        blocks[at].drop()
    return (read_bytes() - before) / (time.perf_counter() - began)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train a recipe; return its losses, a hash of what was learned, and what each step took."""
    if job["cold"]:
        leave_no_cache()
    from benchmarks import shapes
    from lowres_ft import data, device, evaluate, preparing, train
    from lowres_ft.runs import run_folder
    from lowres_ft.streaming import Pages

    machine = device.find("cpu")
    recipe = shapes.recipe(Path(job["base"]), Path(job["rows"]), "chat", job["length"], *job["changes"])
    with tempfile.TemporaryDirectory() as folder, run_folder("streaming", Path(folder) / "out", machine) as place:
        rows = data.load(recipe, place.work)
        resolved = recipe.model_copy(update={"task": rows.task})
        began = time.perf_counter()
        ready = preparing.prepare(resolved, rows, machine, place)
        loading = time.perf_counter() - began
        stream = ready.adapted.stream
        for block in stream.place.layers if stream is not None and isinstance(stream.place, Pages) else ():
            block.map.flush()
        state = train.start(resolved, ready.adapted, ready.tokens["train"], ready.plan)
        steps, read, busy = [], [read_bytes()], [time.process_time()]
        for step in train.train(state, ready.tokens["train"], ready.plan, machine):
            steps.append(step)
            read.append(read_bytes())
            busy.append(time.process_time())
        outputs = evaluate.outputs(ready.adapted, ready.tokens["validation"], ready.plan)
    learned = hashlib.sha256()
    for name, tensor in sorted(ready.adapted.tensors().items()):
        learned.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return {
        "losses": [step.loss.hex() for step in steps],
        "evaluated": hashlib.sha256(outputs.values.tobytes()).hexdigest(),
        "learned": learned.hexdigest(),
        "loading_seconds": loading,
        "step_seconds": [step.seconds for step in steps],
        "step_tokens": [step.tokens for step in steps],
        "step_processor_seconds": [after - before for before, after in pairwise(busy)],
        "step_read_bytes": [after - before for before, after in pairwise(read)],
        "most_layers": None if stream is None else stream.most,
        "plan": ready.plan.model_dump(mode="json"),
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = {"bytes_per_second": pages()} if job.get("pages") else measure(job)
    Path(job["out"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
