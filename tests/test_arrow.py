"""Columns of Arrow are those that pyarrow would make, made and read without pandas."""

import subprocess
import sys

import pyarrow as pa
import pytest

from lowres_ft import arrow

SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("hash", pa.uint64()),
        ("names", pa.list_(pa.string())),
        ("keys", pa.list_(pa.uint64())),
    ]
)


def record(number: int) -> dict[str, object]:
    texts = ["é" * number, ""][: number % 3]
    return {"text": "ü" * (number % 4), "hash": 2**64 - 1 - number, "names": texts, "keys": [number] * (number % 3)}


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_columns_are_as_pyarrow_makes_them(count):
    records = [record(number) for number in range(count)]
    made, expected = arrow.batch(records, SCHEMA), pa.RecordBatch.from_pylist(records, SCHEMA)
    made.validate(full=True)
    assert made.equals(expected)
    assert written(made) == written(expected)


def written(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def test_more_text_than_a_column_counts_is_told(monkeypatch):
    monkeypatch.setattr(arrow, "_MOST", 7)
    with pytest.raises(OverflowError, match="1 rows hold 8 bytes"):
        arrow.batch([{"text": "a" * 8}], pa.schema([("text", pa.string())]))


def test_what_is_no_text_is_refused():
    with pytest.raises(UnicodeEncodeError):
        arrow.batch([{"text": "\ud800"}], pa.schema([("text", pa.string())]))


def test_columns_of_several_chunks_are_read_as_they_were_written():
    records = [record(number) for number in range(9)]
    chunks = [arrow.batch(part, SCHEMA) for part in (records[:4], [], records[4:])]
    for table in (
        pa.Table.from_batches(chunks),
        pa.Table.from_batches(chunks).slice(2, 5),
        pa.Table.from_batches(chunks[1:2]),
    ):
        expected = table.to_pylist()
        assert arrow.numbers(table["hash"]).tolist() == [row["hash"] for row in expected]
        keys = arrow.ragged(table["keys"])
        assert [keys[place].tolist() for place in range(len(expected))] == [row["keys"] for row in expected]


def test_pandas_is_left_out():
    code = (
        "import sys, pyarrow as pa; from lowres_ft import arrow;"
        "kinds = pa.schema([('a', pa.list_(pa.uint64())), ('b', pa.uint64())]);"
        "table = pa.Table.from_batches([arrow.batch([{'a': [1, 2], 'b': 3}], kinds)]);"
        "print(arrow.ragged(table['a'])[0].tolist(), arrow.numbers(table['b']).tolist(), 'pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[1, 2] [3] False\n"
