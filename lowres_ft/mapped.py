"""Tensors in a file that is mapped into memory: what is not in use takes none.

The file has no name, so that it goes with the process, however that ends. It lies in the cache's folder, as a system's
folder for temporary files may be memory itself.
"""

import mmap
import os
import tempfile
import time
from collections.abc import Sequence
from typing import IO, NamedTuple

import torch
from torch import Tensor

from lowres_ft.errors import OutputError
from lowres_ft.files import cache_dir, writing
from lowres_ft.sizes import show_bytes

_ALIGNED = 64  # bytes: PyTorch's own tensors begin so, and the last bit of a product follows from where they begin

_PART, _PARTS = 2**23, 32  # bytes at once, and how often, to measure a disk


class Need(NamedTuple):
    """What a tensor needs of a block."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Up to where the next tensor may begin."""
        return -(-self.shape.numel() * self.dtype.itemsize // _ALIGNED) * _ALIGNED


class Block:
    """A part of a file, mapped, whose pages come as they are touched."""

    def __init__(self, file: IO[bytes], begin: int, size: int) -> None:
        """Map `size` bytes of a file, which may be closed then."""
        self.size = size
        self.map = mmap.mmap(file.fileno(), size, offset=begin)
        self.bytes: Tensor = torch.frombuffer(self.map, dtype=torch.uint8)
        self.used = 0

    def tensor(self, room: Need) -> Tensor:
        """The next tensor of the block, whose values are those of the file."""
        part = self.bytes[self.used : self.used + room.shape.numel() * room.dtype.itemsize]
        self.used += room.bytes
        return part.view(room.dtype).view(room.shape)

    def place(self, tensor: Tensor) -> int | None:
        """Where in the block a tensor begins; None where it lies elsewhere."""
        at = tensor.data_ptr() - self.bytes.data_ptr()
        return at if 0 <= at < self.size and tensor.device == self.bytes.device else None

    def ahead(self) -> None:
        """Let the system begin to read the block; it goes on while others compute."""
        self.map.madvise(mmap.MADV_WILLNEED)

    def drop(self) -> None:
        """Give the pages back; what was written stays, in the file or on its way there."""
        self.map.madvise(mmap.MADV_DONTNEED)


def drop(blocks: Sequence[Block]) -> None:
    """Give the pages of several blocks back."""
    for block in blocks:
        block.drop()


def read_rate() -> float:
    """Bytes a second of a new file in the cache's folder that is read in order, of which the system has nothing kept.

    Raises:
        OutputError: The disk does not hold it.
    """
    folder, room = cache_dir(), bytearray(os.urandom(_PART))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            for _ in range(_PARTS):
                file.write(room)
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            began = time.perf_counter()
            while file.readinto(room):
                pass
            return _PARTS * _PART / (time.perf_counter() - began)


def possible() -> bool:
    """Whether this system lets mapped pages be given back; Windows does not."""
    return hasattr(mmap, "MADV_DONTNEED") and hasattr(os, "posix_fallocate")


def blocks(rooms: Sequence[Sequence[Need]]) -> list[Block]:
    """Blocks of one new file, each with room for its tensors.

    Raises:
        OutputError: The disk does not hold them.
    """
    sizes = [max(1, sum(room.bytes for room in each)) for each in rooms]
    whole = [-(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY for size in sizes]
    folder = cache_dir() / "streaming"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, sum(whole))  # a page that finds no room later would end the process
            return [Block(file, sum(whole[:at]), size) for at, size in enumerate(sizes)]
    except OSError as error:
        raise OutputError(
            f"{folder}: {show_bytes(sum(whole))} of layers cannot be written: {error.strerror or error}",
            hint="Make room, or name another folder in LOWRES_FT_CACHE.",
        ) from error
