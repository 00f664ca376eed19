"""Attention by products: the same numbers as transformers' eager attention, and a kernel for each length."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from lowres_ft import attention, device
from lowres_ft.attention import Heads, Kernel
from lowres_ft.pipeline import run
from tests import tiny
from tests.conftest import prepare, recipe

Bases = Callable[..., Path]


def _eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores if mask is None else scores + mask
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("parts", [1, 10, 10_000])
def test_products_equal_attention_and_its_gradients(
    keep: bool, masked: bool, queries: int, keys: int, parts: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attention, "_IN_CACHE", parts * 35)
    torch.manual_seed(1)
    made = [torch.randn(3, 7, count, 8, dtype=torch.float64) for count in (queries, keys, keys)]
    mask = torch.randn(3, 1, 7, 7, dtype=torch.float64) if masked else None
    gradient = torch.randn(3, 7, queries, 8, dtype=torch.float64)
    found = []
    for compute in (_eager, lambda *inputs: attention.products(*inputs, keep=keep)):
        inputs = [x.clone().transpose(1, 2).requires_grad_() for x in made]
        out = compute(*inputs, mask, 0.3)
        out.backward(gradient)
        found.append([out.detach(), *(x.grad for x in inputs)])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_row_that_sees_nothing_is_no_nan_in_16_bits():
    mask = torch.full((1, 1, 3, 3), torch.finfo(torch.float32).min)
    q, k, v = (torch.randn(1, 2, 3, 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention.products(q, k, v, mask, 1.0, keep=True)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    assert q.grad is not None
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("keep", [True, False])
def test_what_is_kept_is_what_the_kernel_says(keep: bool):
    inputs = [torch.randn(2, 4, 9, 8, requires_grad=True) for _ in range(3)]
    kept: list[tuple[int, ...]] = []

    def keeping(x: Tensor) -> Tensor:
        kept.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(keeping, lambda x: x):
        attention.products(*inputs, None, 1.0, keep=keep)
    assert kept.count((8, 9, 9)) == keep


def test_kernels_are_timed_for_the_lengths_that_can_come():
    heads = Heads(2, 1, 8)
    assert attention.fastest(heads, torch.float32, 128, 256) == {128: "kept"}
    found = attention.fastest(heads, torch.float32, 300, 512)
    assert list(found) == [128, 256, 512]
    assert set(found.values()) <= {"kept", "recomputed", "fused"}


@pytest.mark.parametrize("architecture", [*tiny.ARCHITECTURES, "gemma2"])
@pytest.mark.parametrize("kernel", ["kept", "recomputed", "fused"])
def test_models_answer_as_with_their_own_attention(architecture: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "_IN_CACHE", 100)
    softcapped = {"attn_logit_softcapping": 0.5, "sliding_window": 4, "head_dim": 8, **tiny.ARCHITECTURES["gemma"]}
    fields = {**tiny.ARCHITECTURES, "gemma2": softcapped}[architecture]
    config = AutoConfig.for_model(architecture, **fields, vocab_size=50, pad_token_id=0)
    torch.manual_seed(3)
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    if not model._supports_attention_backend:
        pytest.skip("has an attention of its own")
    ids = torch.randint(5, 50, (3, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    found = []
    for implementation in ("eager", attention.implementation({16: kernel})):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        out = model(input_ids=ids, attention_mask=mask).last_hidden_state
        kept = out * mask[..., None]
        kept.square().sum().backward()
        found.append([kept.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_run_times_attention_once(bases: Bases, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOWRES_FT_CACHE", str(tmp_path / "cache"))
    calls: list[int] = []

    def fastest(_heads: Heads, _dtype: torch.dtype, longest: int, _tokens: int) -> dict[int, Kernel]:
        calls.append(longest)
        return {128: "kept", 256: "recomputed"}

    monkeypatch.setattr(attention, "fastest", fastest)
    long = recipe(bases("bert", max_position_embeddings=256), reviews, "task.max_length=200", "train.steps=1")
    bundles = [run(long, tmp_path / name, device_name="cpu") for name in ("one", "two")]
    assert calls == [200]
    assert {tuple(bundle.passport.plan.attention_kernels.items()) for bundle in bundles} == {
        ((128, "kept"), (256, "recomputed"))
    }
    machine = device.find("cpu")
    assert all(bundle.verify(machine).exact for bundle in bundles)
    assert calls == [200]  # a bundle is served as it was measured


def test_a_base_with_an_attention_of_its_own_keeps_it(bases: Bases, reviews: Path, tmp_path: Path):
    for architecture, expected in (("bert", "products"), ("deberta-v2", "eager")):
        assert prepare(recipe(bases(architecture), reviews), tmp_path / architecture).plan.attention == expected
