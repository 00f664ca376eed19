"""One way of a cell in a process of its own: `python -m benchmarks.on_gpu.measure JOB --out FILE`, JOB in JSON."""

import argparse
import importlib
import json
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.job import Clock
from benchmarks.measure import peak_bytes
from benchmarks.on_gpu.cells import Job
from lowres_ft import device, speed

_GIB = 2**30


def measure(job: Job) -> dict[str, Any]:
    """The figures of a job; where memory does not suffice, what for."""
    context = _capped(job)
    family = importlib.import_module(f"benchmarks.on_gpu.{job.way.family}")
    found: dict[str, Any] = {"way": job.way.name, "machine": _machine(job)}
    if job.way.family == "products":
        return found | {"fits": True, "products": family.measure(job)}
    at = "weights"
    try:
        with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
            setting = importlib.import_module("benchmarks.on_gpu.setting").setting(job, Path(folder))
            ready = family.build(setting)
            loaded = _loaded(job)
            at = "steps"
            clock = Clock(job.warmup, job.device)
            losses = ready.run(clock)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
            raise
        return found | {"fits": False, "at": at, "told": str(error).splitlines()[0]}
    seconds = [end - begin for begin, end in zip(clock.times, clock.times[1:], strict=False)][job.warmup - 1 :]
    return found | {
        "fits": True,
        "seconds": seconds,
        "tokens": clock.tokens[-1],
        "tokens/s": clock.tokens[-1] / statistics.median(seconds),
        "first_loss": losses[0] if losses else None,
        "loss": losses[-1] if losses else None,
        "trainable_parameters": ready.trainable_parameters,
        "plan": ready.plan,
        **loaded,
        **_memory(job, context),
        **_copies(job, ready),
    }


def _copies(job: Job, ready: Any) -> dict[str, float]:
    """Of layers that pass: bytes that a step copied, and how long the bus takes for them."""
    if ready.copied is None:
        return {}
    each = ready.copied() / (job.warmup + job.steps)
    return {"copied": each, "copying_seconds": each / speed.link(job.device)}


def _capped(job: Job) -> int:
    """Let PyTorch have of the GPU what the cap leaves beside CUDA's own memory, and return that."""
    if job.device == "cpu":
        return 0
    torch.empty(1, device=job.device)
    context = _outside()
    if job.cap is not None:
        share = (job.cap * _GIB - context) / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)))
    return context


def _outside() -> int:
    """Bytes of the GPU that are in use beside PyTorch's: those of CUDA, where nobody else computes."""
    free, total = torch.cuda.mem_get_info()
    return int(total - free - torch.cuda.memory_reserved())


def _loaded(job: Job) -> dict[str, int]:
    """Bytes of the model, and the most that it took to make it."""
    if job.device == "cpu":
        return {}
    found = {"held": torch.cuda.memory_allocated(), "making": torch.cuda.max_memory_allocated()}
    torch.cuda.reset_peak_memory_stats()
    return found


def _memory(job: Job, context: int) -> dict[str, int]:
    """Peaks of the steps in bytes: of tensors, and of all that a card must have for them."""
    if job.device == "cpu":
        return {"memory": peak_bytes("cpu")}
    card = torch.cuda.max_memory_reserved() + max(context, _outside())
    return {"memory": torch.cuda.max_memory_allocated(), "card": card, "context": context}


def _machine(job: Job) -> dict[str, Any]:
    named = torch.cuda.get_device_name() if job.device != "cpu" else "cpu"
    return {"device": named, "versions": device.versions()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    job = Job.of(json.loads(given.job))
    given.out.write_text(json.dumps(measure(job) | {"job": asdict(job)}), encoding="utf-8")


if __name__ == "__main__":
    main()
