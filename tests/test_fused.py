"""The kernel for int8 products, in Triton's interpreter: near float64, of any shape. On a GPU it is tested as it is."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowres_ft.linear import AdaptedLinear
from lowres_ft.storage import Int8, use

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


RELATIVE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


def compare(device: str, *dtypes: torch.dtype) -> None:
    """Forward and backward of odd and of whole tiles, contiguous or not, against float64."""
    torch.manual_seed(0)
    shapes = ((1, 40, 64), (5, 33, 70), (70, 200, 130), (16, 64, 128), (0, 40, 64))
    for dtype in dtypes:
        for rows, outputs, inputs in shapes:
            codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device)
            layer = AdaptedLinear(Int8(codes, torch.rand(outputs, device=device)), None)
            use(layer, "triton")
            x = torch.randn(inputs, rows, device=device).to(dtype).t()
            dy = torch.randn(rows, outputs, device=device).to(dtype)
            x.requires_grad_()
            dense = layer.storage.dequantized().double()
            for found, expected in (
                (layer(x).detach(), x.detach().double() @ dense.t()),
                (torch.autograd.grad(layer(x), x, dy)[0], dy.double() @ dense),
            ):
                assert found.dtype == dtype
                gap, size = float((found - expected).norm()), float(expected.norm())
                assert gap <= RELATIVE[dtype] * size, (dtype, rows, outputs, inputs, gap, size)


@needs_triton
def test_the_kernels_logic_is_right():
    """In fp16: the interpreter multiplies bf16's bits as if they were whole numbers."""
    code = "import torch; from tests.test_fused import compare; compare('cpu', torch.float16); print('compared')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert (done.returncode, done.stdout) == (0, "compared\n"), done.stderr


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_kernel_is_right():
    compare("cuda", *RELATIVE)


def test_fp32_and_other_kernels_do_without():
    layer = AdaptedLinear(Int8(torch.randint(-127, 128, (8, 16), dtype=torch.int8), torch.rand(8)), None)
    x = torch.randn(3, 16)
    before = layer(x)
    use(layer, "triton")
    assert torch.equal(layer(x), before)
