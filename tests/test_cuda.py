"""What only a GPU can show: products and gradients there, a step as on a processor, and the peak of a loss.

Not yet run on a GPU.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lowres_ft import quantize
from lowres_ft.dropout import DropoutKeys
from lowres_ft.linear import LowRankLinear
from lowres_ft.methods.base import LowRank
from lowres_ft.storage import Plain, Storage
from lowres_ft.tasks import _chunked
from lowres_ft.tasks.base import Batch
from lowres_ft.train import train
from tests import tiny_chat
from tests.conftest import prepare, recipe

Bases = Callable[..., Path]

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

INPUTS, OUTPUTS, ROWS, RANK = 256, 320, 96, 8


def gap(found: Tensor, expected: Tensor) -> float:
    found, expected = (part.detach().cpu().double() for part in (found, expected))
    return float((found - expected).norm() / expected.norm())


def held(form: str, device: str = "cuda") -> Storage:
    weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    return Plain(weight.to(device)) if form == "none" else quantize.quantized(weight.to(device), form)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("form", ["none", "int8", "nf4"])
def test_products_and_gradients_are_near_float64(form: str, biased: bool, dtype: torch.dtype, relative: float):
    torch.manual_seed(2)
    storage = held(form)
    if form == "none":
        storage = Plain(storage.weight.to(dtype))
    bias = torch.randn(OUTPUTS, device="cuda").to(dtype) if biased else None
    layer = LowRankLinear(storage, bias, LowRank(RANK, 2.0), "layer", DropoutKeys(seed=3))
    nn.init.normal_(layer.lora_B)
    x = torch.randn(ROWS, INPUTS, device="cuda").to(dtype).requires_grad_()
    dy = torch.randn(ROWS, OUTPUTS, device="cuda").to(dtype)
    exact_x, a, b = (part.detach().double().requires_grad_() for part in (x, layer.lora_A, layer.lora_B))
    exact = exact_x @ storage.dequantized().double().t() + 2.0 * (exact_x @ a.t()) @ b.t()
    exact = exact if bias is None else exact + bias.double()
    found = layer(x)
    assert (found.dtype, found.device.type) == (dtype, "cuda")
    assert gap(found, exact) < relative
    expected = torch.autograd.grad(exact, [exact_x, a, b], dy.double())
    gradients = torch.autograd.grad(found, [x, layer.lora_A, layer.lora_B], dy)
    assert all(gap(ours, theirs) < 4 * relative for ours, theirs in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_codes_made_on_a_gpu_are_those_of_a_processor(form: str):
    there, here = held(form).dequantized(), held(form, "cpu").dequantized()
    # Where a weight lies between two codes, the two may round it to either.
    same = (there.cpu() - here).abs() <= 1e-6 * here.abs().max()
    assert float(same.float().mean()) > 0.999
    assert gap(there, here) < 0.01


@pytest.mark.parametrize("quantized", ["none", "int8", "nf4"])
def test_a_step_changes_a_model_as_on_a_processor(bases: Bases, reviews: Path, tmp_path: Path, quantized: str):
    wide = bases("bert", hidden_size=64, intermediate_size=128)
    wanted = recipe(wide, reviews, f"model.quantize={quantized}", "method.dropout=0.2")
    known = {}
    for device in ("cpu", "cuda"):
        ready = prepare(wanted, tmp_path / device, device, attention="sdpa", attention_kernels={})
        begin = {name: tensor.cpu().clone() for name, tensor in ready.adapted.trained().items()}
        step = next(train(ready.start(), ready.tokens["train"], ready.plan, ready.machine))
        known[device] = step, begin, {name: tensor.cpu() for name, tensor in ready.adapted.trained().items()}
    (here, begin, ours), (there, began, theirs) = known["cpu"], known["cuda"]
    assert there.loss == pytest.approx(here.loss, rel=1e-3)
    assert there.gradient_norm == pytest.approx(here.gradient_norm, rel=1e-2)
    assert all(torch.equal(begin[name], began[name]) for name in begin)
    changes = [torch.cat([(after[name] - begin[name]).flatten() for name in begin]) for after in (ours, theirs)]
    # Adam's first step is the gradient's sign: one near zero may have another.
    assert gap(changes[1], changes[0]) < 0.1


def test_a_chunked_loss_holds_no_logits_of_all_tokens(
    chat_bases: Bases, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    vocabulary, rows, length = 1 << 16, 16, 128
    base = chat_bases("llama", vocab_size=vocabulary)
    ready = prepare(tiny_chat.recipe(base, chats, "task.template=plain"), tmp_path / "work", "cuda")
    monkeypatch.setitem(_chunked.LOGITS, "cuda", 1 << 22)
    ids = torch.randint(4, 40, (rows, length), device="cuda")
    batch = Batch(ids, torch.ones_like(ids), ids.roll(-1, 1), torch.arange(rows, device="cuda"))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ready.adapted.task.loss(ready.adapted.model, batch).backward()
    torch.cuda.synchronize()
    whole = 4 * rows * length * vocabulary  # bytes of all logits in fp32
    assert torch.cuda.max_memory_allocated() - before < whole / 2
