"""Tensors in a mapped file: where they begin, what stays of them, and a disk that is full."""

import pytest
import torch

from lowres_ft import mapped
from lowres_ft.errors import OutputError
from lowres_ft.mapped import Block, Need


def test_blocks_hold_tensors_where_pytorch_would_let_them_begin():
    rooms = [
        Need(torch.Size([3, 5]), torch.float32),
        Need(torch.Size([7]), torch.int8),
        Need(torch.Size([]), torch.float32),
    ]
    first, second = mapped.blocks([rooms, rooms])
    made = [block.tensor(room) for block in (first, second) for room in rooms]
    for number, tensor in enumerate(made):
        tensor.fill_(number)
        assert tensor.data_ptr() % 64 == 0
    for block in (first, second):
        block.drop()
    assert [float(tensor.max()) for tensor in made] == [0, 1, 2, 3, 4, 5]
    assert [first.place(tensor) for tensor in made[:3]] == [0, 64, 128]
    assert first.place(made[3]) is None


def test_a_disk_without_room_is_told(monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OutputError, match=r"1\.0 GiB of layers cannot be written: No space left") as caught:
        mapped.blocks([[Need(torch.Size([2**30]), torch.uint8)]])
    assert "LOWRES_FT_CACHE" in caught.value.hint


def test_a_block_belongs_to_one_file_that_has_no_name():
    (block,) = mapped.blocks([[Need(torch.Size([4]), torch.float32)]])
    assert isinstance(block, Block)
    assert not list((mapped.cache_dir() / "streaming").iterdir())


def test_a_disk_has_a_rate():
    assert mapped.read_rate() > 1e6
