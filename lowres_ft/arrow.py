"""Columns of Arrow made from Python's values, and read as arrays of numpy.

pyarrow's own ways import pandas, to ask of a list whether it is a Series, and to give out arrays: 30 MB of each run.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from lowres_ft.tasks.base import Ragged

_MOST = 2**31 - 1  # bytes of text, or elements of lists, that a column's places can count


def batch(records: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    """Records with a value for each field: uint64, strings, or lists of them."""
    columns = [_column([record[field.name] for record in records], field.type) for field in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def numbers(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """(N,) the elements of a column of numbers, of which none is missing; those of one chunk stay where they are."""
    whole: pa.Array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    found: np.ndarray = np.from_dlpack(whole)
    return found


def ragged(column: pa.ChunkedArray) -> Ragged:
    """The elements of a column of lists of numbers."""
    whole = column.combine_chunks()
    return Ragged(numbers(whole.flatten()), starts(whole))


def starts(lists: pa.Array) -> np.ndarray:
    """(N + 1,) where each list begins among the elements of all, and the last one ends."""
    return np.concatenate([[0], np.cumsum(numbers(lists.value_lengths()))])


def _column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    make = _lists if pa.types.is_list(kind) else _MAKERS[kind]
    return make(values, kind)


def _numbers(values: Sequence[int], kind: pa.DataType) -> pa.Array:
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.array(values, np.uint64))])


def _strings(values: Sequence[str], kind: pa.DataType) -> pa.Array:
    text, lengths = bytearray(), []
    for value in values:
        encoded = value.encode()
        text += encoded
        lengths.append(len(encoded))
    return pa.Array.from_buffers(kind, len(values), [None, _places(lengths), pa.py_buffer(text)])


def _lists(values: Sequence[Sequence[Any]], kind: pa.DataType) -> pa.Array:
    inner = _column([*chain.from_iterable(values)], kind.value_type)
    return pa.Array.from_buffers(kind, len(values), [None, _places([*map(len, values)])], children=[inner])


def _places(lengths: Sequence[int]) -> pa.Buffer:
    """Where each value begins, and the last one ends."""
    places = np.cumsum([0, *lengths], dtype=np.int64)
    if places[-1] > _MOST:
        raise OverflowError(f"{len(lengths):,} rows hold {places[-1]:,} bytes of text, which is too much at once")
    return pa.py_buffer(places.astype(np.int32))


_MAKERS: dict[pa.DataType, Callable[[Sequence[Any], pa.DataType], pa.Array]] = {
    pa.uint64(): _numbers,
    pa.string(): _strings,
}
