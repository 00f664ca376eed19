"""Products of a shape's int8 weights: converted and multiplied, in one kernel, and as bitsandbytes does.

LLM.int8 is no third kernel of ours: it rounds the other factor to 8 bits too. It is here to show what that would gain.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.on_gpu.cells import SHAPES, Job
from lowres_ft import libraries, quantize
from lowres_ft.storage import Int8, Plain, Storage

_SECONDS = 0.3  # for each product
_CHECKED = 64  # rows that are compared with float64

Product = Callable[[Tensor], Tensor]


def measure(job: Job) -> list[dict[str, Any]]:
    """Milliseconds, TFLOP/s and relative error of each kernel, forward and backward."""
    generator = torch.Generator(job.device).manual_seed(job.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=job.device, dtype=torch.bfloat16)

    found = []
    for outputs, inputs in _widths(job):
        weight = random(outputs, inputs).mul_(0.02)
        held = quantize.quantized(weight, "int8")
        assert isinstance(held, Int8)
        rows = job.rows * job.row
        x, dy = random(rows, inputs), random(rows, outputs)
        for name, (forward, backward) in _kernels(held, weight, job).items():
            exact = weight.double() if name == "bf16" else held.dequantized(torch.float64)
            told = {"kernel": name, "rows": rows, "outputs": outputs, "inputs": inputs}
            told |= {f"forward_{what}": value for what, value in _figures(forward, x, exact.t(), job).items()}
            told |= {f"backward_{what}": value for what, value in _figures(backward, dy, exact, job).items()}
            found.append(told)
    return found


def _figures(product: Product, x: Tensor, exact: Tensor, job: Job) -> dict[str, float]:
    """Of a product with a matrix that is known in float64; the first call, which may compile, is not timed."""
    wanted = x[:_CHECKED].double() @ exact
    error = float((product(x)[:_CHECKED].double() - wanted).norm() / wanted.norm())
    seconds = _time(product, x, job)
    return {"ms": seconds * 1e3, "tflops": 2e-12 * x.numel() * exact.shape[1] / seconds, "error": error}


def _widths(job: Job) -> list[tuple[int, int]]:
    """Outputs and inputs of the layers: queries, keys, up and down."""
    config = SHAPES[job.shape].config if not job.tiny else job.config
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    keys = int(config["num_key_value_heads"]) * int(config["head_dim"])
    return [(hidden, hidden), (keys, hidden), (inner, hidden), (hidden, inner)]


def _kernels(held: Int8, weight: Tensor, job: Job) -> dict[str, tuple[Product, Product]]:
    def of(storage: Storage) -> tuple[Product, Product]:
        return storage.product, storage.product_backward

    found = {"bf16": of(Plain(weight)), "dequantize": of(held)}
    if importlib.util.find_spec("lowres_ft.fused") and job.device != "cpu":
        fused = Int8(held.weight, held.absmax)
        vars(fused).update(kernel="triton")
        found["triton"] = of(fused)
    found["LLM.int8"] = _bitsandbytes(held)
    return found


def _bitsandbytes(held: Int8) -> tuple[Product, Product]:
    """What bitsandbytes' layer computes, which keeps nothing of its own for the gradient of its input."""
    library = libraries.bitsandbytes()
    layer = library.nn.Linear8bitLt(held.inputs, held.outputs, False, has_fp16_weights=False, threshold=6.0)
    layer.weight = library.nn.Int8Params(held.weight, requires_grad=False, CB=held.weight, SCB=held.absmax)
    ends: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = layer(x)
        return found

    def backward(dy: Tensor) -> Tensor:
        if id(dy) not in ends:
            x = dy.new_ones(len(dy), held.inputs).requires_grad_()
            ends[id(dy)] = (x, layer(x))
        x, y = ends[id(dy)]
        return torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    return forward, backward


def _time(product: Product, x: Tensor, job: Job) -> float:
    """Seconds of a product, the median of as many as fit into the time."""
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < _SECONDS:
        began = time.perf_counter()
        product(x)
        if job.device != "cpu":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
        if job.tiny and len(taken) >= 3:
            break
    return statistics.median(taken)
