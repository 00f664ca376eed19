"""One contender in a process of its own: `python -m benchmarks.measure WORK CONTENDER --folder F --out FILE`.

It works through the untimed steps and the timed ones; then, outside of what is timed and of the peak, it computes the
loss on the held-out rows. No library is imported before the contender's own, so that none sets what another would not.
"""

import argparse
import importlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks import works
from benchmarks.job import Clock, Job, Made, Sequences

_EVALUATED = 1 << 11  # padded tokens that are evaluated at once
_IGNORED = -100


def measure(job: Job) -> dict[str, Any]:
    """Run a contender; return its raw figures."""
    contender = importlib.import_module(f"benchmarks.contenders.{job.contender.family}")
    imported = resident_bytes()
    clock = Clock(job.work.clocked, job.device)
    made: Made = contender.run(job, clock)
    peak = peak_bytes(job.device)
    loss, items = held_out_loss(made, job)
    return {
        "contender": job.contender.name,
        "seed": job.seed,
        "seconds": clock.seconds,
        "tokens": clock.timed_tokens,
        "tokens/s": clock.timed_tokens / clock.seconds,
        "all_tokens": sum(clock.tokens),
        "step_ends": [time - clock.times[0] for time in clock.times],
        "step_tokens": clock.tokens,
        "memory": peak,
        "imported": imported,
        "growth": peak if job.device != "cpu" else peak - imported,
        "loss": loss,
        "items": items,
        "trainable_parameters": made.trainable_parameters,
        "frozen_bytes": made.frozen_bytes,
        "weights": made.linear_bytes,
        "plan": made.plan,
    }


def resident_bytes() -> int:
    """Memory that this process holds now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_bytes(device: str) -> int:
    """Most memory so far; our library, which knows it, is not imported before a peer is done."""
    from lowres_ft.device import peak_bytes

    return peak_bytes(device)


def held_out_loss(made: Made, job: Job) -> tuple[float, int]:
    """Mean loss of an item in nats, from a model's logits in fp32, and the number of items."""
    import torch
    from torch.nn.functional import cross_entropy

    total, items = 0.0, 0
    for part in _parts(job.sequences("held_out")):
        width = max(len(ids) for ids, _ in part)
        padded = [ids + [made.pad] * (width - len(ids)) for ids, _ in part]
        mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in part]
        targets = [
            own + [_IGNORED] * (len(ids) - len(own)) * job.chats for (_, own), ids in zip(part, padded, strict=True)
        ]
        with torch.inference_mode():
            inputs = (torch.tensor(values, device=job.device) for values in (padded, mask))
            logits = made.logits(*inputs).float().cpu().flatten(0, -2)
        wanted = torch.tensor(targets).flatten()
        total += float(cross_entropy(logits, wanted, ignore_index=_IGNORED, reduction="sum"))
        items += int((wanted != _IGNORED).sum())
    return total / items, items


def _parts(sequences: Sequences) -> Iterator[Sequences]:
    """Sequences of about one length, so many that they are few tokens."""
    ordered = iter(sorted(sequences, key=lambda one: -len(one[0])))
    while first := next(ordered, None):
        yield [first, *islice(ordered, max(0, _EVALUATED // len(first[0]) - 1))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work")
    parser.add_argument("contender")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=works.SEED)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    work = works.chosen(given.work, quick=given.quick)
    contender = work.named(given.contender)
    if contender.family == "ours":  # whose command line does so
        from lowres_ft import allocator

        allocator.restart()
    job = Job(work, contender, given.folder, given.seed, given.device)
    given.out.write_text(json.dumps(measure(job)), encoding="utf-8")


if __name__ == "__main__":
    main()
