"""`benchmarks/streaming.py`: the limit from outside, what it sees of a process, and what it takes for the same."""

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import streaming

MIB = 2**20


def run(name: str, *, few: bool = False, offload: str = "layers", **changes: Any) -> dict[str, Any]:
    known = {"losses": ["0x1"], "evaluated": "a", "learned": "b", "most_resident": {"VmRSS": 800 * MIB}, "exit": 0}
    steps = {
        "step_seconds": [9.0, 2.0, 2.0],
        "step_processor_seconds": [9.0, 1.0, 1.0],
        "step_read_bytes": [0, 4e9, 4e9],
    }
    return {"name": name, "few": few, "offload": offload, **known, **steps, **changes}


def test_a_process_gets_no_more_memory_than_the_limit_and_is_seen_from_outside():
    code = "held = bytearray({} * 2**20); held[::4096] = b'x' * len(held[::4096]); import time; time.sleep(0.3)"
    small = streaming.watched([sys.executable, "-c", code.format(64)], 256 * MIB)
    assert small["exit"] == 0
    assert 64 * MIB < small["most"]["RssAnon"] <= small["most"]["VmRSS"] < 256 * MIB
    large = streaming.watched([sys.executable, "-c", code.format(512)], 256 * MIB)
    assert large["exit"] != 0
    assert "MemoryError" in large["told"]
    assert streaming.resident(2**30) == {}


def test_a_way_is_compared_with_the_resident_one_of_its_kind():
    record = {
        "base_bytes": 2 * 2**30,
        "limit_bytes": 2**30,
        "disk_bytes_per_second": 2.4e9,
        "pages_bytes_per_second": 1.8e9,
        "runs": [
            run("resident", offload="none"),
            run("resident, limited", offload="none", exit=1, told="can't allocate memory"),
            run("passing"),
            run("few", few=True, offload="none", losses=["0x2"]),
            run("few passing", few=True, losses=["0x2"], learned="c"),
        ],
    }
    assert [streaming.same(one, record) for one in record["runs"]] == [True, False, True, True, False]
    lines = streaming.lines(record)
    assert "can't allocate memory" in lines[4]
    assert lines[5].split() == ["passing", "800", "MiB", "2.0", "s", "1.0", "s", "4.00", "GB", "2.00", "as", "resident"]
    assert lines[7].endswith("OTHERS")


@pytest.mark.parametrize("way", streaming.WAYS, ids=lambda way: way.name)
def test_each_way_is_a_recipe(way: streaming.Way, tmp_path: Path):
    from benchmarks import shapes

    job = way.job(tmp_path)
    recipe = shapes.recipe(Path(job["base"]), Path(job["rows"]), "chat", job["length"], *job["changes"])
    assert recipe.budget.offload == way.offload
    assert recipe.train.batch_size == (1 if way.few else 2)


def test_a_disk_is_read(tmp_path: Path):
    assert streaming.disk(tmp_path, size=2**24) > 1e6
