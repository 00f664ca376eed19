"""AdaptedLinear against PEFT, bitsandbytes and float64."""

import peft
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowres_ft import quantize
from lowres_ft.dropout import DropoutKeys
from lowres_ft.linear import DoraLinear, LowRankLinear, ScaledLinear
from lowres_ft.methods.base import LowRank, Scale
from lowres_ft.methods.lora import Lora
from lowres_ft.storage import Int8, Nf4, Plain, Storage
from tests.test_storage import INPUTS, OUTPUTS, close, dequantized, foreign

RANK = 4


def adapted(
    held: Tensor | Storage, bias: Tensor | None, *, dropout: float = 0.0, scaling: float = 2.0
) -> LowRankLinear:
    """A layer whose B is not zero, so that the adapter counts."""
    held = Plain(held) if isinstance(held, Tensor) else held
    layer = LowRankLinear(held, bias, LowRank(RANK, scaling, dropout), "layer", DropoutKeys(seed=3))
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize("shape", [(5, INPUTS), (2, 3, INPUTS), (0, INPUTS)], ids=["2-D", "3-D", "empty"])
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d"])
@pytest.mark.parametrize("rslora", [False, True])
def test_forward_and_gradients_are_pefts(kind: str, shape: tuple[int, ...], rslora: bool):
    torch.manual_seed(1)
    plain = Conv1D(OUTPUTS, INPUTS) if kind == "conv1d" else nn.Linear(INPUTS, OUTPUTS, bias=kind == "linear")
    method = Lora(rank=RANK, alpha=12.0, rslora=rslora)
    config = LoraConfig(r=RANK, lora_alpha=12, use_rslora=rslora, target_modules=["0"], fan_in_fan_out=kind == "conv1d")
    weight = plain.weight.detach().clone()
    ours = adapted(weight.t().contiguous() if kind == "conv1d" else weight, plain.bias, scaling=method.scaling)
    theirs = peft.get_peft_model(nn.Sequential(plain), config).base_model.model[0]
    theirs.lora_A["default"].weight.data.copy_(ours.lora_A)
    theirs.lora_B["default"].weight.data.copy_(ours.lora_B)
    x, y = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], OUTPUTS)
    found, expected = ours(x), theirs(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ours_grads = torch.autograd.grad((found * y).sum(), [x, ours.lora_A, ours.lora_B])
    their_weights = [theirs.lora_A["default"].weight, theirs.lora_B["default"].weight]
    for ours_grad, their_grad in zip(
        ours_grads, torch.autograd.grad((expected * y).sum(), [x, *their_weights]), strict=True
    ):
        assert close(ours_grad, their_grad, 1e-5)


def test_formulas_hold_in_float64_with_dropout():
    layer = adapted(torch.randn(OUTPUTS, INPUTS).double(), torch.randn(OUTPUTS).double(), dropout=0.3)
    layer.keys.set(step=5, rows=torch.tensor([7, 9]), length=3)
    x = torch.randn(2, 3, INPUTS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
@pytest.mark.parametrize("form", ["none", "int8", "nf4"])
def test_each_dtype_is_near_float64(dtype: torch.dtype, relative: float, form: str):
    torch.manual_seed(2)
    layer, dense = dense_layer(dtype) if form == "none" else quantized_layer(form)
    if layer.bias is not None:
        layer.bias = layer.bias.to(dtype)
    x = torch.randn(6, INPUTS).to(dtype).requires_grad_()
    y = torch.randn(6, OUTPUTS)
    exact_x = x.detach().double().requires_grad_()
    a, b = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    bias = 0 if layer.bias is None else layer.bias.double()
    exact = exact_x @ dense.double().t() + bias + layer.scaling * (exact_x @ a.t()) @ b.t()
    found = layer(x)
    assert found.dtype == dtype
    assert close(found, exact, relative)
    expected = torch.autograd.grad((exact * y).sum(), [exact_x, a, b])
    grads = torch.autograd.grad((found * y.to(dtype)).sum(), [x, layer.lora_A, layer.lora_B])
    assert all(close(ours, theirs, 4 * relative) for ours, theirs in zip(grads, expected, strict=True))
    assert grads[1].dtype == grads[2].dtype == torch.float32


def dense_layer(dtype: torch.dtype) -> tuple[LowRankLinear, Tensor]:
    weight = torch.randn(OUTPUTS, INPUTS).to(dtype)
    return adapted(weight, torch.randn(OUTPUTS)), weight


def quantized_layer(form: str) -> tuple[LowRankLinear, Tensor]:
    """A layer from bitsandbytes' own, and the weight that bitsandbytes takes its codes for."""
    module = foreign(form)
    held = quantize.storage(module)
    assert isinstance(held, Int8 if form == "int8" else Nf4)
    return adapted(held, module.bias), dequantized(module)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_gradients_stay_the_same_after_an_evaluation(form: str):
    """bitsandbytes' own nf4 layer repacks its weight in `eval`, and its backward pass skips it from then on."""
    torch.manual_seed(6)
    layer, _ = quantized_layer(form)
    x = torch.randn(6, INPUTS, requires_grad=True)
    found = []
    for _ in range(2):
        found.append(torch.autograd.grad(layer.train()(x).square().sum(), [x, layer.lora_A, layer.lora_B]))
        with torch.inference_mode():
            layer.eval()(x.detach())
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))
    assert bool(found[0][0].abs().max() > 0)


def test_new_adapters_change_nothing_and_follow_from_seed_and_name():
    held = Plain(torch.randn(OUTPUTS, INPUTS))
    layers = [
        LowRankLinear(held, None, LowRank(RANK, 2.0), name, DropoutKeys(seed))
        for name, seed in [("a", 1), ("a", 1), ("b", 1), ("a", 2)]
    ]
    first, same, *others = [layer.lora_A for layer in layers]
    assert torch.equal(first, same)
    assert not any(torch.equal(first, other) for other in others)
    x = torch.randn(3, INPUTS)
    torch.testing.assert_close(layers[0](x), x @ held.weight.t())
    assert first.abs().max().item() <= INPUTS**-0.5


def test_delta_is_what_the_adapter_adds():
    layer = adapted(torch.randn(OUTPUTS, INPUTS), None)
    x = torch.randn(3, INPUTS)
    torch.testing.assert_close(layer(x), x @ (layer.weight + layer.delta()).t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_and_its_gradients_are_pefts(kind: str, dropout: float, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(1)
    plain = Conv1D(OUTPUTS, INPUTS) if kind == "conv1d" else nn.Linear(INPUTS, OUTPUTS)
    nn.init.normal_(plain.bias)
    weight = plain.weight.detach().clone()
    held = Plain(weight.t().contiguous() if kind == "conv1d" else weight)
    ours = DoraLinear(held, plain.bias, LowRank(RANK, 3.0, dropout, magnitude=True), "layer", DropoutKeys(seed=3))
    nn.init.normal_(ours.lora_B, std=0.1)
    nn.init.uniform_(ours.lora_magnitude_vector, 0.5, 2)
    config = LoraConfig(
        r=RANK,
        lora_alpha=12,
        use_dora=True,
        lora_dropout=dropout,
        target_modules=["0"],
        fan_in_fan_out=kind == "conv1d",
    )
    theirs = peft.get_peft_model(nn.Sequential(plain), config).base_model.model[0]
    their_weights = [
        theirs.lora_A["default"].weight,
        theirs.lora_B["default"].weight,
        theirs.lora_magnitude_vector["default"].weight,
    ]
    weights = [ours.lora_A, ours.lora_B, ours.lora_magnitude_vector]
    for own, other in zip(weights, their_weights, strict=True):
        assert own.shape == other.shape
        other.data.copy_(own)
    x, y = torch.randn(2, 3, INPUTS, requires_grad=True), torch.randn(2, 3, OUTPUTS)
    ours.keys.set(step=5, rows=torch.tensor([7, 9]), length=3)
    if dropout:  # the same mask for both
        mask = ours.mask(x.shape)
        assert mask is not None
        seen = mask.masked(torch.ones(6, INPUTS)).view(x.shape) * mask.scale
        monkeypatch.setattr(theirs.lora_dropout["default"], "forward", lambda found: found * seen)
    found, expected = ours(x), theirs(x)
    assert close(found, expected, 1e-6)
    for own, other in zip(
        torch.autograd.grad((found * y).sum(), [x, *weights]),
        torch.autograd.grad((expected * y).sum(), [x, *their_weights]),
        strict=True,
    ):
        assert close(own, other, 1e-5)
    merged, bias = ours.merged()
    ours.keys.clear()
    torch.testing.assert_close(ours(x), nn.functional.linear(x, merged, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["none", "int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_new_dora_layer_computes_its_base_to_the_bit(form: str, dtype: torch.dtype):
    plain = dense_layer(dtype)[0] if form == "none" else quantized_layer(form)[0]
    layer = DoraLinear(plain.storage, None, LowRank(RANK, 2.0, magnitude=True), "layer", DropoutKeys(3))
    x = torch.randn(6, INPUTS).to(dtype)
    assert torch.equal(layer(x), plain.storage.product(x))


@pytest.mark.parametrize("form", ["none", "int8", "nf4"])
def test_doras_norms_are_those_of_the_dequantized_sum(form: str):
    plain = dense_layer(torch.float32)[0] if form == "none" else quantized_layer(form)[0]
    layer = DoraLinear(plain.storage, None, LowRank(RANK, 2.0, magnitude=True), "layer", DropoutKeys(3))
    nn.init.normal_(layer.lora_B)
    exact = (plain.storage.dequantized().double() + layer.delta().double()).norm(dim=1)
    assert close(layer.norms(), exact, 1e-6)
    assert close(layer.norms(torch.bfloat16) if form != "none" else layer.norms(), exact, 5e-3)


def pissa(held: Tensor | Storage, scaling: float = 2.0, dropout: float = 0.0) -> LowRankLinear:
    held = Plain(held) if isinstance(held, Tensor) else held
    layer = LowRankLinear(held, None, LowRank(RANK, scaling, dropout), "layer", DropoutKeys(3))
    layer.begin_with(held.dequantized())
    layer.take_back()
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pissa_begins_at_its_base_to_the_bit(dtype: torch.dtype):
    weight = torch.randn(OUTPUTS, INPUTS)
    layer = pissa(weight.to(dtype))
    x = torch.randn(6, INPUTS).to(dtype)
    assert torch.equal(layer(x), layer.storage.product(x))
    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    left, values, right = torch.linalg.svd(weight.to(dtype).double(), full_matrices=False)
    nearest = (left[:, :RANK] * values[:RANK]) @ right[:RANK]
    torch.testing.assert_close(2.0 * (b.double() @ a.double()), nearest, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_pissa_trains_one_half_and_takes_the_other_back(dropout: float):
    torch.manual_seed(7)
    layer = pissa(torch.randn(OUTPUTS, INPUTS), dropout=dropout)
    with torch.no_grad():
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    layer.keys.set(step=5, rows=torch.arange(6), length=1)
    x, y = torch.randn(6, INPUTS, requires_grad=True), torch.randn(6, OUTPUTS)
    mask = layer.mask(x.shape)
    dropped = x if mask is None else x * mask.masked(torch.ones(6, INPUTS)) * mask.scale
    update = layer.lora_B @ layer.lora_A - layer.lora_B0 @ layer.lora_A0
    expected = x @ layer.weight.t() + layer.scaling * dropped @ update.t()
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    inputs = [x, layer.lora_A, layer.lora_B]
    for own, other in zip(
        torch.autograd.grad((found * y).sum(), inputs), torch.autograd.grad((expected * y).sum(), inputs), strict=True
    ):
        assert close(own, other, 1e-5)
    assert close(layer.delta(), layer.scaling * update.detach(), 1e-5)
    saved = layer.saved()
    assert (saved["lora_A"].shape, saved["lora_B"].shape) == ((2 * RANK, INPUTS), (OUTPUTS, 2 * RANK))
    assert close(saved["lora_B"] @ saved["lora_A"], update.detach(), 1e-5)


def test_pissa_in_bf16_holds_small_changes():
    """Held as factors and their negatives, changes below 1/256 of a factor would be lost to rounding."""
    torch.manual_seed(8)
    layer = pissa(torch.randn(OUTPUTS, INPUTS).bfloat16())
    with torch.no_grad():
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.mul_(1 + 1e-4 * torch.randn_like(parameter))
    x = torch.randn(6, INPUTS).bfloat16()
    exact = x.double() @ layer.delta().double().t()
    base = torch.zeros_like(layer.weight)
    layer.storage = Plain(base)
    assert close(layer(x), exact, 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["none", "int8", "nf4"])
@pytest.mark.parametrize("of", ["inputs", "outputs"])
def test_scales_and_their_gradients_are_near_float64(of: str, form: str, dtype: torch.dtype):
    torch.manual_seed(9)
    plain, dense = dense_layer(dtype) if form == "none" else quantized_layer(form)
    bias = torch.randn(OUTPUTS).to(dtype)
    layer = ScaledLinear(plain.storage, bias, Scale("inputs" if of == "inputs" else "outputs"))
    assert layer.ia3_l.shape == ((1, INPUTS) if of == "inputs" else (OUTPUTS, 1))
    x = torch.randn(6, INPUTS).to(dtype).requires_grad_()
    y = torch.randn(6, OUTPUTS)
    assert torch.equal(layer(x), plain.storage.product(x, bias))
    nn.init.uniform_(layer.ia3_l, 0.5, 2)
    exact_x = x.detach().double().requires_grad_()
    factors = layer.ia3_l.detach().double().requires_grad_()
    if of == "inputs":
        exact = nn.functional.linear(exact_x * factors, dense.double(), bias.double())
    else:
        exact = nn.functional.linear(exact_x, dense.double(), bias.double()) * factors[:, 0]
    relative = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    found = layer(x)
    assert found.dtype == dtype
    assert close(found, exact, relative)
    grads = torch.autograd.grad((found * y.to(dtype)).sum(), [x, layer.ia3_l])
    expected = torch.autograd.grad((exact * y).sum(), [exact_x, factors])
    assert all(close(own, other, 4 * relative) for own, other in zip(grads, expected, strict=True))
    merged, merged_bias = layer.merged()
    whole = nn.functional.linear(exact_x, merged.double(), None if merged_bias is None else merged_bias.double())
    assert close(found, whole, 2 * relative)
