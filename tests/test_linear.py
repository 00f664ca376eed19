"""AdaptedLinear against PEFT, bitsandbytes and float64; keyed dropout against its definition."""

import bitsandbytes
import peft
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowres_ft.errors import ModelError
from lowres_ft.linear import AdaptedLinear, DropoutKeys
from lowres_ft.methods.base import LowRank
from lowres_ft.methods.lora import Lora
from lowres_ft.quantize import codes

INPUTS, OUTPUTS, RANK = 24, 40, 4


def adapted(
    weight: Tensor, bias: Tensor | None, *, scale: Tensor | None = None, dropout: float = 0.0, scaling: float = 2.0
) -> AdaptedLinear:
    """A layer whose B is not zero, so that the adapter counts."""
    layer = AdaptedLinear(weight, bias, scale=scale)
    layer.adapt("layer", LowRank(RANK, scaling, dropout), DropoutKeys(seed=3))
    assert layer.lora_B is not None
    nn.init.normal_(layer.lora_B)
    return layer


def close(found: Tensor | None, expected: Tensor, relative: float) -> bool:
    assert found is not None
    gap = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    return bool(gap <= relative)


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
    assert ours.lora_A is not None
    assert ours.lora_B is not None
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
    assert layer.keys is not None
    layer.keys.set(step=5, rows=torch.tensor([7, 9]), length=3)
    x = torch.randn(2, 3, INPUTS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
@pytest.mark.parametrize("quantized", [False, True])
def test_each_dtype_is_near_float64(dtype: torch.dtype, relative: float, quantized: bool):
    torch.manual_seed(2)
    layer, dense = quantized_layer() if quantized else dense_layer(dtype)
    if layer.bias is not None:
        layer.bias = layer.bias.to(dtype)
    assert layer.lora_A is not None
    assert layer.lora_B is not None
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


def dense_layer(dtype: torch.dtype) -> tuple[AdaptedLinear, Tensor]:
    weight = torch.randn(OUTPUTS, INPUTS).to(dtype)
    return adapted(weight, torch.randn(OUTPUTS)), weight


def quantized_layer() -> tuple[AdaptedLinear, Tensor]:
    """An int8 layer from bitsandbytes' own, and the weight that bitsandbytes takes its codes for."""
    module = bitsandbytes.nn.Linear8bitLt(INPUTS, OUTPUTS, has_fp16_weights=False)
    nn.init.normal_(module.weight.data)
    module = module.to("cpu")
    found = codes(module)
    assert found is not None
    dense = bitsandbytes.functional.int8_vectorwise_dequant(module.weight.CB, module.weight.SCB)
    layer = adapted(found[0], module.bias, scale=found[1])
    exact = found[0].float() * found[1][:, None]
    torch.testing.assert_close(exact, dense.float(), rtol=1e-6, atol=0)
    return layer, exact


def test_int8_in_fp16_does_not_overflow_before_its_scale():
    weight = torch.full((2, 2048), 127, dtype=torch.int8)
    layer = AdaptedLinear(weight, None, scale=torch.full((2,), 1e-3 / 127))
    x = torch.full((1, 2048), 10.0, dtype=torch.float16, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, torch.full((1, 2), 20.48, dtype=torch.float16), rtol=1e-2, atol=0)
    y.sum().backward()
    assert bool(torch.isfinite(x.grad).all())  # type: ignore[arg-type]


def masks(layer: AdaptedLinear, step: int, rows: list[int], length: int) -> Tensor:
    """(B, T, inputs): the mask that a layer applies, seen through an adapter that is the identity."""
    assert layer.keys is not None
    layer.keys.set(step, torch.tensor(rows), length)
    seen = layer(torch.ones(len(rows), length, layer.in_features))
    layer.keys.clear()
    return seen


def identity(dropout: float, width: int = 64, name: str = "layer", seed: int = 3) -> AdaptedLinear:
    layer = AdaptedLinear(torch.zeros(width, width), None)
    layer.adapt(name, LowRank(width, 1.0, dropout), DropoutKeys(seed))
    for parameter in (layer.lora_A, layer.lora_B):
        assert parameter is not None
        nn.init.eye_(parameter)
    return layer


def test_dropout_keeps_the_right_share_and_scales_what_it_keeps():
    seen = masks(identity(0.1), step=1, rows=list(range(200)), length=8)
    kept = (seen != 0).float()
    assert abs(kept.mean().item() - 0.9) < 0.003
    torch.testing.assert_close(seen[seen != 0], torch.full_like(seen[seen != 0], 1 / 0.9))
    # No row, position or feature is favoured: the spread of each one's share is that of independent draws.
    for axes in ((0, 1), (0, 2), (1, 2)):
        share = kept.mean(dim=axes)
        expected = (0.09 / (kept.numel() / share.numel())) ** 0.5
        assert share.std().item() < 1.4 * expected


def test_dropout_depends_on_example_and_position_but_not_on_the_cut_or_the_padding():
    layer = identity(0.5)
    whole = masks(layer, 4, [11, 5, 8], length=6)
    torch.testing.assert_close(whole[1:2, :3], masks(layer, 4, [5], length=3))
    torch.testing.assert_close(whole[[2, 0]], masks(layer, 4, [8, 11], length=6))


@pytest.mark.parametrize("change", ["step", "row", "layer", "seed"])
def test_dropout_changes_with_each_key(change: str):
    other = identity(0.5, name="other" if change == "layer" else "layer", seed=4 if change == "seed" else 3)
    first = masks(identity(0.5), 1, [1], length=4)
    second = masks(other, 2 if change == "step" else 1, [2 if change == "row" else 1], length=4)
    assert 0.35 < (first == second).float().mean().item() < 0.65


def test_an_input_that_all_examples_share_is_keyed_by_the_step_alone():
    layer = identity(0.5)
    assert layer.keys is not None
    seen = []
    for rows in ([1, 2, 3], [7, 8]):
        layer.keys.set(2, torch.tensor(rows), length=5)
        seen.append(layer(torch.ones(1, 9, 64)))
    torch.testing.assert_close(seen[0], seen[1])


def test_an_input_that_cannot_be_keyed_is_refused():
    layer = identity(0.5)
    assert layer.keys is not None
    layer.keys.set(2, torch.tensor([1, 2]), length=5)
    with pytest.raises(ModelError, match=r"shape \(5, 2, 64\) for 2 texts of 5 tokens"):
        layer(torch.ones(5, 2, 64))


def test_texts_that_are_flattened_one_behind_the_other_get_the_same_mask():
    layer = identity(0.5)
    assert layer.keys is not None
    layer.keys.set(2, torch.tensor([1, 2]), length=5)
    torch.testing.assert_close(layer(torch.ones(10, 64)).view(2, 5, 64), layer(torch.ones(2, 5, 64)))


def test_without_keys_there_is_no_dropout():
    layer = identity(0.5)
    torch.testing.assert_close(layer(torch.ones(2, 64)), torch.ones(2, 64))


def test_new_adapters_change_nothing_and_follow_from_seed_and_name():
    layers = [AdaptedLinear(torch.randn(OUTPUTS, INPUTS), None) for _ in range(4)]
    for layer, (name, seed) in zip(layers, [("a", 1), ("a", 1), ("b", 1), ("a", 2)], strict=True):
        layer.adapt(name, LowRank(RANK, 2.0, 0.0), DropoutKeys(seed))
    first, same, *others = [layer.lora_A for layer in layers]
    assert first is not None
    assert same is not None
    assert torch.equal(first, same)
    assert not any(torch.equal(first, other) for other in others if other is not None)
    x = torch.randn(3, INPUTS)
    torch.testing.assert_close(layers[0](x), x @ layers[0].weight.t())
    assert first.abs().max().item() <= INPUTS**-0.5


def test_delta_is_what_the_adapter_adds():
    layer = adapted(torch.randn(OUTPUTS, INPUTS), None)
    x = torch.randn(3, INPUTS)
    torch.testing.assert_close(layer(x), x @ (layer.weight + layer.delta()).t(), rtol=1e-5, atol=1e-5)
