"""Weights in safetensors files, each tensor read into memory of its own when transformers asks for it.

transformers maps the files. Mapped pages count as memory of the process, and those of a whole file stay as long as one
of its tensors does; read by safetensors, a tensor lies where it may, and fp32 products differ in their last bit with
where that is. Here it lies where PyTorch's own would.
"""

import math
import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO
from typing import Any

import torch
from torch import Tensor
from transformers import modeling_utils

from lowres_ft import foreign

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


_OWN_PAGES = 2**20  # bytes from which pages of its own cost a tensor little


@contextmanager
def unmapped(*, for_a_moment: bool = False) -> Iterator[None]:
    """Let transformers read the files that it would map.

    Tensors that are there `for_a_moment` have pages of their own: others' would be left in pieces between them.
    """
    mapping, files = modeling_utils.safe_open, ExitStack()

    def opened(path: Any, *args: Any, **options: Any) -> Any:
        if options.get("backend", "mmap") != "mmap":
            return mapping(path, *args, **options)
        found = mapping(path, *args, **options | {"backend": "pread"})  # a map of the file would count as data
        if "backend" not in options:  # transformers looks for dtypes in the headers
            return found
        return _File(files.enter_context(open(path, "rb", buffering=0)), found, for_a_moment)

    modeling_utils.safe_open = opened
    try:
        with files:
            yield
    finally:
        modeling_utils.safe_open = mapping


class _File:
    """A safetensors file, which safetensors has found sound."""

    def __init__(self, raw: FileIO, file: Any, for_a_moment: bool) -> None:
        self.raw, self.file, self.for_a_moment = raw, file, for_a_moment
        self.keys, self.__exit__ = file.keys, file.__exit__
        self.places = foreign.read_header(raw)
        self.begin = raw.tell()

    def get_slice(self, name: str) -> "_Tensor":
        return _Tensor(self, name)

    def room(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        """Memory for a tensor, whose values do not matter."""
        size = math.prod(shape) * dtype.itemsize
        if not self.for_a_moment or size < _OWN_PAGES:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)

    def read(self, room: memoryview, at: int) -> None:
        """Fill a room with the bytes at a place; `pread` may be called by several threads."""
        while room:
            count = os.preadv(self.raw.fileno(), [room], at)
            if not count:
                raise OSError("a file of weights ends early")
            room, at = room[count:], at + count


class _Tensor:
    """A tensor that is read when it is asked for."""

    def __init__(self, file: _File, name: str) -> None:
        self.file, self.name, self.place = file, name, file.places[name]

    def get_shape(self) -> list[int]:
        return list(self.place["shape"])

    def get_dtype(self) -> str:
        return str(self.place["dtype"])

    def __getitem__(self, index: Any) -> Tensor:
        dtype = _DTYPES.get(self.place["dtype"])
        if dtype is None:  # 8 bits and fewer, of bases that are not taken
            return self.file.file.get_tensor(self.name)[index]  # type: ignore[no-any-return]
        whole = self.file.room(self.place["shape"], dtype)
        self.file.read(
            whole.reshape(-1).view(torch.uint8).numpy().data, self.file.begin + self.place["data_offsets"][0]
        )
        return whole[index]
