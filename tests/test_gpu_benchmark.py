"""`benchmarks/gpu.py` on tiny models and a processor: its cells, its ladder under a cap, its record and its tables."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu import Session
from benchmarks.on_gpu import measure, table
from benchmarks.on_gpu.cells import (
    LAYERS,
    OUR_LADDER,
    OURS,
    PASSING_CAP,
    PASSING_LADDER,
    PRODUCTS,
    SHAPES,
    TRAINER,
    Cell,
    Job,
    cells,
)

GIB = 2**30
ALL = tuple(SHAPES)


def figures(way: str = "ours", **changes: Any) -> dict[str, Any]:
    """What a process may find."""
    known = {"way": way, "fits": True, "tokens/s": 3000.0, "memory": 10 * GIB, "card": 11 * GIB, "context": GIB}
    known |= {
        "first_loss": 11.8,
        "loss": 11.7,
        "trainable_parameters": 42,
        "machine": {"device": "A"},
        "seconds": [1.0],
    }
    return known | changes


def job(shape: str, numbers: str, way: Any, **changes: Any) -> Job:
    return replace(Job(shape, numbers, 512, way, None, "cpu", True, warmup=1, steps=2), **changes)  # type: ignore


@pytest.mark.filterwarnings("ignore")  # of Trainer, PEFT and bitsandbytes
@pytest.mark.parametrize(
    ("shape", "numbers"),
    [("qwen3-0.6b", "int8"), ("llama-3.1-8b", "nf4"), ("modernbert-base", "int8"), ("bert-base", "bf16")],
)
def test_ours_and_trainer_begin_with_the_same_model_and_rows(shape: str, numbers: str):
    ours, theirs = (measure.measure(job(shape, numbers, way)) for way in (OURS, TRAINER))
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=0.02)
    assert ours["trainable_parameters"] == theirs["trainable_parameters"]
    assert ours["tokens"] == theirs["tokens"] == 64
    for found in (ours, theirs):
        assert len(found["seconds"]) == 2
        assert found["fits"]
        assert found["tokens/s"] > 0
        json.dumps(found)
    assert ours["plan"]["dtype"] == "bfloat16"


@pytest.mark.filterwarnings("ignore")
def test_each_rung_is_an_experiment_of_the_same_rows():
    """Cut by rows the loss is the same; embeddings in int8 change it a little."""
    known = [way for way in OUR_LADDER if gpu.has(way)]
    losses = {way.name: measure.measure(job("qwen3-0.6b", "int8", way))["first_loss"] for way in known}
    assert losses["ours row by row"] == pytest.approx(losses["ours"], rel=1e-3)
    assert losses["ours row by row, int8 embeddings"] == pytest.approx(losses["ours"], rel=0.02)


@pytest.mark.filterwarnings("ignore")
def test_products_are_timed_and_compared_with_float64():
    found = measure.measure(job("llama-3.1-8b", "int8", PRODUCTS, length=2048))["products"]
    assert {one["kernel"] for one in found} == {"bf16", "dequantize", "LLM.int8"}
    for one in found:
        assert one["forward_ms"] > 0
        assert one["backward_error"] < 0.02
        assert one["forward_error"] < (0.05 if one["kernel"] == "LLM.int8" else 0.02)


def test_a_process_of_its_own_measures_a_cell_that_the_record_then_holds(tmp_path: Path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, gpu.__file__, "--device", "cpu", "--tiny", "--shapes", "bert-base", "--cap", "0"]
    command += ["--warmup", "1", "--steps", "1", "--out", str(out), "--time-limit", "300"]
    wanted = [
        cell for cell in cells(("bert-base",), (None,), few=False) if cell.numbers != "bf16" or cell.ways != (OURS,)
    ]
    done = {cell.key: figures(cell.ways[0].name) | named(cell) for cell in wanted}
    out.write_text(json.dumps({"format": 1, "tiny": True, "machine": None, "cells": done}))
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "bert-base bf16 512 ours: ours, " in found.stdout, found.stdout + found.stderr
    record = json.loads(out.read_text())
    assert len(record["cells"]) == len(wanted) + 1
    assert record["machine"]["device"] == "cpu"
    assert "All of the GPU" in found.stdout


def test_the_command_itself_imports_nothing_heavy():
    code = "import sys, benchmarks.gpu; print(sorted({'torch', 'numpy', 'typer', 'lowres_ft'} & set(sys.modules)))"
    root = Path(gpu.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "[]\n"


def named(cell: Cell) -> dict[str, Any]:
    return {"shape": cell.shape, "numbers": cell.numbers, "length": cell.length, "cap": cell.cap}


@dataclass(frozen=True)
class Told(Session):
    """A session whose processes are answered here: each way takes its GiB."""

    needs: dict[str, float] | None = None
    asked: tuple[list[str], ...] = ([],)

    def child(self, job: Job) -> dict[str, Any]:
        self.asked[0].append(job.way.name)
        need = (self.needs or {}).get(job.way.name, 10.0)
        if job.cap is None or need <= job.cap:
            return figures(job.way.name, memory=round(need * GIB), context=0)
        at = "weights" if need == 100 else "steps"
        return {"way": job.way.name, "fits": False, "at": at, "machine": None}


def told(**needs: float) -> Told:
    session = Told("cuda", False, 3, 10, None, {name.replace("_", " "): need for name, need in needs.items()}, ([],))
    assert session.asked == ([],)
    return session


@pytest.fixture
def whole_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of lowres_ft that can recompute."""
    monkeypatch.setattr(gpu, "has", lambda way: True)
    monkeypatch.setattr(gpu, "lacking", lambda cell: [])


def test_the_first_way_that_fits_under_a_cap_is_told_and_what_was_tried(whole_version: None):
    session, record = told(ours=20, ours_selective=12, ours_layers=7), {"machine": None, "cells": {}}
    cell = Cell("llama-3.1-8b", "int8", 2048, OUR_LADDER, 8.0)
    assert list(gpu.measure([cell], session, record)) == [
        "llama-3.1-8b int8 2048 ours in 8 GiB: ours layers, 3,000 tokens/s, 7.00 GiB (0 s)"
    ]
    found = record["cells"][cell.key]
    assert session.asked == (["ours", "ours selective", "ours layers"],)  # a step of one row is not cut by rows
    assert [one["way"] for one in found["tried"]] == ["ours", "ours selective"]
    assert found["cap"] == 8.0
    again = list(gpu.measure([cell], session, record))
    assert again == []
    assert len(session.asked[0]) == 3


def test_weights_that_do_not_fit_are_tried_once(whole_version: None):
    session = told(ours=100, ours_selective=100, ours_layers=100)
    record: dict[str, Any] = {"machine": None, "cells": {}}
    ladder = [Cell("llama-3.1-8b", "int8", 2048, OUR_LADDER, cap) for cap in (8.0, 6.0)]
    lines = list(gpu.measure(ladder, session, record))
    assert session.asked == (["ours", "ours row by row, int8 embeddings", "ours layers, row by row, int8 embeddings"],)
    assert "OOM (steps)" in lines[0]
    assert "OOM (as in 8 GiB)" in lines[1]


def test_what_took_more_without_a_cap_is_not_tried(whole_version: None):
    session, record = told(ours=20, ours_layers=9), {"machine": None, "cells": {}}
    free = [Cell("qwen3-4b", "int8", 2048, (way,)) for way in (OURS, LAYERS)]
    list(gpu.measure([*free, Cell("qwen3-4b", "int8", 2048, OUR_LADDER, 15.0)], session, record))
    assert session.asked == (["ours", "ours layers", "ours row by row"],)


def test_failures_are_measured_again_and_missing_modules_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "_COMPUTES", ("json", "no_such_module"))
    cell = Cell("bert-base", "bf16", 512, (OURS,))
    record: dict[str, Any] = {"machine": None, "cells": {cell.key: named(cell) | {"error": "x", "way": "ours"}}}
    assert list(gpu.measure([cell], told(), record)) == [f"{cell.key}: skipped, as there is no no_such_module"]
    monkeypatch.setattr(gpu, "_COMPUTES", ("json",))
    assert "3,000 tokens/s" in next(gpu.measure([cell], told(), record))
    assert "error" not in record["cells"][cell.key]


def test_time_that_is_up_stops_between_cells():
    session = replace(told(), until=0.0)
    record: dict[str, Any] = {"machine": None, "cells": {}}
    (line,) = gpu.measure([Cell("bert-base", "bf16", 512, (OURS,))], session, record)
    assert line.startswith("time is up")
    assert not record["cells"]


def test_the_essential_cells_come_first_and_each_stands_once():
    few, everything = cells(ALL, None, few=True), cells(ALL, None, few=False)
    assert everything[: len(few)] == few
    assert len({cell.key for cell in everything}) == len(everything)
    assert few[0].ways == (PRODUCTS,)
    assert few[1].key == "llama-3.1-8b int8 2048 ours"
    assert {cell.shape for cell in everything} == set(SHAPES)
    assert not [cell for cell in everything if cell.shape == "bert-base" and cell.length > 512]
    assert {cell.cap for cell in cells(ALL, (6.0,), few=False)} == {6.0}
    assert {cell.cap for cell in cells(ALL, (None,), few=False)} == {None}


def test_the_tables_tell_ratios_goals_caps_and_what_is_wrong():
    trained = {"shape": "llama-3.1-8b", "numbers": "int8", "length": 2048, "cap": None}
    theirs = figures("trainer", **{"tokens/s": 1000.0, "memory": 30 * GIB, "first_loss": 11.9})
    small = Cell("llama-3.1-8b", "int8", 2048, OUR_LADDER, 12.0)
    record = {
        "tiny": False,
        "cells": {
            "a": trained | figures(),
            "b": trained | theirs,
            "c": trained | figures("ours layers", first_loss=9.0),
            "d": trained | {"way": "ours triton", "error": "no kernel\nTritonError: bad"},
            "e": figures("ours layers") | named(small),
            "f": {"way": "trainer", "fits": False, "at": "steps"} | named(replace(small, cap=6.0)),
            "g": trained | {"way": "products", "fits": True, "products": [product()]},
        },
    }
    text = "\n".join(table.lines(record))
    assert "3,000     10.00 GiB  11.00 GiB  11.800 -> 11.700  3.00                 0.33" in text
    assert "In 12 GiB, CUDA's own included" in text
    assert "trainer: OOM" in text
    assert "dequantize" in text
    goals = text.partition("Goals")[2]
    assert [line.split() for line in goals.splitlines()[2:5]] == [
        ["ours", "trainer", "3.00", "0.33", "met"],
        ["ours", "layers", "trainer", "3.00", "0.33", "met"],
        ["ours", "layers", "12", "GiB", "met"],
    ]
    assert [*table.wrong(record)] == [
        "d: TritonError: bad",
        "llama-3.1-8b int8 2048: ours layers and trainer begin with losses of 9.0000 and 11.9000",
    ]


def product() -> dict[str, Any]:
    known = {"kernel": "dequantize", "rows": 2048, "outputs": 4096, "inputs": 4096}
    return known | {f"{way}_{name}": 1.0 for way in ("forward", "backward") for name in ("ms", "tflops", "error")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("numbers", ["nf4", "bf16"])
def test_layers_that_pass_are_the_same_experiment(numbers: str):
    """On a processor in pages of a file, so that nothing is copied."""
    resident = measure.measure(job("llama-3.1-8b", numbers, LAYERS))
    passing = measure.measure(job("llama-3.1-8b", numbers, PASSING_LADDER[0]))
    assert passing["plan"]["offload"] == "layers"
    assert passing["first_loss"] == pytest.approx(resident["first_loss"], rel=1e-3)
    assert "copied" not in passing


def test_the_goal_of_passing_layers_tells_what_share_of_a_step_copies_explain():
    cell = next(cell for cell in cells(ALL, None, few=True) if cell.cap == PASSING_CAP)
    assert (cell.shape, cell.numbers, cell.length) == ("llama-3.1-8b", "nf4", 512)
    told = figures(PASSING_LADDER[0].name, copied=6e9, copying_seconds=0.24, seconds=[0.3, 0.32, 0.2]) | named(cell)
    (line,) = [line for line in table.lines({"tiny": False, "cells": {"a": told}}) if "copies" in line]
    assert line.split()[-1] == "met"
    assert "copies 80%" in line
