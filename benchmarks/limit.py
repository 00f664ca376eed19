"""The limit: how fast this machine multiplies matrices. `python -m benchmarks.limit --out FILE`."""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
_SECONDS = 0.5  # for each size


def rates(device: str) -> dict[str, float]:
    """FLOPs a second of the best of some square products, by dtype."""
    return {
        name: max(_rate(size, getattr(torch, name), device) for size in _SIZES[device])
        for name in ("float32", "bfloat16")
    }


def _rate(size: int, dtype: torch.dtype, device: str) -> float:
    """FLOPs a second of one product, the median of as many as fit into the time."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    taken: list[float] = []
    torch.mm(a, b)
    while len(taken) < 3 or sum(taken) < _SECONDS:
        began = time.perf_counter()
        torch.mm(a, b)
        if device != "cpu":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return 2.0 * size**3 / statistics.median(taken)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.write_text(json.dumps(rates(given.device)), encoding="utf-8")
