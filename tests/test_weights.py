"""Files of weights: what is read is what safetensors reads, in memory of PyTorch's own."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import modeling_utils

from lowres_ft import weights

HELD = {
    "a": torch.randn(300, 70),
    "b": torch.randn(5).bfloat16(),
    "c": torch.tensor(3.0, dtype=torch.float16),
    "d": torch.randint(-127, 128, (9, 3), dtype=torch.int8),
    "e": torch.tensor([True, False]),
    "f": torch.empty(0, 4),
    "g": torch.arange(7),
    "h": torch.randn(4).to(torch.float8_e4m3fn),
    "i": torch.randn(600, 500),  # more than a MiB
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(HELD, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("for_a_moment", [False, True])
def test_each_tensor_is_read_as_it_is_and_lies_where_pytorch_puts_its_own(path: Path, for_a_moment: bool):
    with weights.unmapped(for_a_moment=for_a_moment):
        file = modeling_utils.safe_open(path, framework="pt", device="cpu", backend="mmap")
        assert sorted(file.keys()) == sorted(HELD)
        slices = {name: file.get_slice(name) for name in HELD}
        for _ in range(3):
            with ThreadPoolExecutor(4) as pool:
                found = dict(zip(slices, pool.map(lambda one: one[...], slices.values()), strict=True))
            for name, tensor in HELD.items():
                assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
                assert torch.equal(found[name].float(), tensor.float())
                assert found[name].data_ptr() % 64 == 0 or name == "h"
        assert slices["a"].get_shape() == [300, 70]
        assert slices["b"].get_dtype() == "BF16"
        assert torch.equal(slices["a"][2:4], HELD["a"][2:4])
        file.__exit__(None, None, None)


def test_no_file_is_mapped_where_memory_of_ones_own_is_bounded(path: Path):
    """A private map of a file counts against RLIMIT_DATA as a whole."""
    code = (
        "import resource, sys; from transformers import modeling_utils; from lowres_ft import weights;"
        "used = int(next(x for x in open('/proc/self/status') if x.startswith('VmData')).split()[1]) * 1024;"
        "resource.setrlimit(resource.RLIMIT_DATA, (used + 2**20, resource.RLIM_INFINITY));"
        "context = weights.unmapped(); context.__enter__();"
        "file = modeling_utils.safe_open(sys.argv[1], framework='pt', device='cpu', backend='mmap');"
        "print(len(file.keys())); context.__exit__(None, None, None)"
    )
    save_file({"large": torch.zeros(2**22)}, path)
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr[-300:]) == ("1\n", "")


def test_what_is_not_mapped_is_left_alone(path: Path):
    before = modeling_utils.safe_open
    with weights.unmapped(), modeling_utils.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert modeling_utils.safe_open is before


def read_what_is_cut_off(path: Path) -> None:
    with weights.unmapped():
        file = modeling_utils.safe_open(path, framework="pt", device="cpu", backend="mmap")
        one = file.get_slice("a")
        path.write_bytes(path.read_bytes()[:1000])
        one[...]


def test_everything_is_as_before_after_a_failure(path: Path):
    before = modeling_utils.safe_open
    with pytest.raises(OSError, match="a file of weights ends early"):
        read_what_is_cut_off(path)
    assert modeling_utils.safe_open is before
