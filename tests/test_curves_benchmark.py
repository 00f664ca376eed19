"""The benchmark of learning curves, on a record that stands already."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import curves

SIZES = (50, 100, 200, 400, 800, 1600)


def record(path: Path, last: float) -> Path:
    law = {size: 0.9 - 3 * size**-0.6 for size in SIZES} | {SIZES[-1]: last}
    scores = [
        {"size": size, "seed": seed, "value": value + 0.002 * (seed - 8), "low": value - 0.02, "high": value + 0.02}
        for size, value in law.items()
        for seed in (7, 8, 9, 10)
    ]
    path.write_text(json.dumps({"wnut16": scores}))
    return path


@pytest.mark.parametrize(("last", "inside", "code"), [(0.9 - 3 * 1600**-0.6, 1.0, 0), (0.5, 0.5, 1)])
def test_each_hidden_size_is_a_case_for_each_choice_of_seeds(last: float, inside: float, code: int, tmp_path: Path):
    cases = list(curves._cases("wnut16", json.loads(record(tmp_path / "scores.json", last).read_text())["wnut16"]))
    assert [(case.hidden, len(case.seeds)) for case in cases] == [(800, 3)] * 4 + [(1600, 3)] * 4
    assert sum(case.inside for case in cases) / len(cases) == inside
    app = typer.Typer()
    app.command()(curves.main)
    done = CliRunner().invoke(app, ["--show", "--record", str(tmp_path / "scores.json")])
    assert done.exit_code == code
    assert f"goals: inside in at least 90%: {inside:.0%}" in done.output
