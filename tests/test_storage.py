"""Quantized weights against bitsandbytes' own, to the bit, and their products against float64."""

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from lowres_ft import quantize, storage
from lowres_ft.dropout import DropoutKeys
from lowres_ft.linear import AdaptedLinear, LowRankLinear
from lowres_ft.methods.base import LowRank
from lowres_ft.storage import NF4_BLOCK, Int8, Nf4, Storage

INPUTS, OUTPUTS = 64, 40


def close(found: Tensor | None, expected: Tensor, relative: float) -> bool:
    assert found is not None
    gap = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    return bool(gap <= relative)


def foreign(form: str, *, bias: bool = True, dtype: torch.dtype = torch.float32, nested: bool = True) -> nn.Linear:
    """A layer of bitsandbytes, quantized from a weight of `dtype` by bitsandbytes itself."""
    if form == "int8":
        module = bitsandbytes.nn.Linear8bitLt(INPUTS, OUTPUTS, bias, has_fp16_weights=False)
    else:
        module = bitsandbytes.nn.LinearNF4(INPUTS, OUTPUTS, bias, compress_statistics=nested)
    nn.init.normal_(module.weight.data)
    module.weight.data = module.weight.data.to(dtype)
    return module.to("cpu")


def dequantized(module: nn.Linear) -> Tensor:
    """The weight that bitsandbytes takes a layer's codes for, in the dtype that it gives."""
    functional = bitsandbytes.functional
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        return functional.int8_vectorwise_dequant(module.weight.CB, module.weight.SCB)
    return functional.dequantize_4bit(module.weight.data, module.weight.quant_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["int8", "nf4", "nf4 with plain maxima"])
def test_weights_are_bitsandbytes_own_to_the_bit(form: str, dtype: torch.dtype):
    torch.manual_seed(4)
    module = foreign(form.split()[0], dtype=dtype, nested=form == "nf4")
    held = quantize.storage(module)
    assert isinstance(held, Int8 if form == "int8" else Nf4)
    expected = dequantized(module)
    found = held.dequantized(expected.dtype)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    if isinstance(held, Nf4):
        assert held.absmax.dtype == (torch.uint8 if form == "nf4" else torch.float32)
        assert len(held.absmax) * NF4_BLOCK == INPUTS * OUTPUTS


def test_nf4_is_the_table_of_its_paper():
    """Each weight is the nearest of the 16 quantiles, times the absolute maximum of its block."""
    torch.manual_seed(5)
    weight = torch.randn(3, 128)
    module = bitsandbytes.nn.Linear4bit(128, 3, bias=False, quant_type="nf4", compress_statistics=False)
    module.weight.data.copy_(weight)
    held = quantize.storage(module.to("cpu"))
    assert held is not None
    table = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    blocks = weight.view(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    nearest = table[(blocks[..., None] / absmax[..., None] - table).abs().argmin(-1)] * absmax
    torch.testing.assert_close(held.dequantized(), nearest.view(3, 128), rtol=1e-5, atol=0)
    assert held.weight.numel() * 2 == weight.numel()


def with_adapter(held: Storage, bias: Tensor | None) -> LowRankLinear:
    layer = LowRankLinear(held, bias, LowRank(4, 2.0), "layer", DropoutKeys(seed=3))
    nn.init.normal_(layer.lora_B)
    return layer


SHAPES = {"2-D": (6, INPUTS), "3-D": (2, 3, INPUTS), "empty": (0, INPUTS), "empty 3-D": (2, 0, INPUTS)}


@pytest.mark.parametrize("at_once", [2**22, 7 * INPUTS], ids=["whole", "in slices"])
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["int8", "nf4", "nf4 with plain maxima"])
def test_products_of_quantized_weights_are_near_float64(
    form: str, shape: str, biased: bool, contiguous: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
):
    """Forward and backward, of a layer without and with an adapter; 1e-6 in fp32, 1e-2 in bf16, 1e-3 in fp16."""
    monkeypatch.setattr(storage, "_AT_ONCE", at_once)
    for dtype, relative in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        torch.manual_seed(2)
        module = foreign(form.split()[0], bias=biased, dtype=dtype, nested=form == "nf4")
        held, dense = quantize.storage(module), dequantized(module).double()
        assert held is not None
        bias = None if module.bias is None else nn.init.normal_(module.bias).detach().to(dtype)
        sizes = SHAPES[shape]
        x, dy = torch.randn(sizes).to(dtype), torch.randn(*sizes[:-1], OUTPUTS).to(dtype)
        if not contiguous:  # what a transpose of heads and tokens leaves
            x, dy = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, dy))
        for layer in (AdaptedLinear(held, bias), with_adapter(held, bias)):
            x.requires_grad_()
            exact_x = x.detach().double().requires_grad_()
            update = layer.delta().double() if isinstance(layer, LowRankLinear) else 0.0
            expected = nn.functional.linear(exact_x, dense + update, None if bias is None else bias.double())
            found = layer(x)
            assert (found.dtype, found.shape) == (dtype, expected.shape)
            assert close(found, expected, relative)
            ours, theirs = torch.autograd.grad(found, x, dy), torch.autograd.grad(expected, exact_x, dy.double())
            assert close(ours[0], theirs[0], 4 * relative)


def test_int8_in_fp16_does_not_overflow_before_its_scale():
    weight = torch.full((2, 2048), 127, dtype=torch.int8)
    layer = AdaptedLinear(Int8(weight, torch.full((2,), 1e-3)), None)
    x = torch.full((1, 2048), 10.0, dtype=torch.float16, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, torch.full((1, 2), 20.48, dtype=torch.float16), rtol=1e-2, atol=0)
    y.sum().backward()
    assert bool(torch.isfinite(x.grad).all())  # type: ignore[arg-type]
