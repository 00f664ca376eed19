"""Methods beside each other: trained once, compared by seed, gone on with where they were stopped."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from benchmarks import compare_methods
from tests.conftest import recipe

Bases = Callable[..., Path]


def test_what_stands_there_is_not_trained_again(
    bases: Bases, reviews: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "tiny.yaml").write_text(recipe(bases(), reviews).to_yaml())
    options = {"recipe": str(tmp_path / "tiny.yaml"), "method": ["lora", "head"], "seed": [3], "out": tmp_path / "out"}
    compare_methods.main(**options)
    out, err = capfd.readouterr()
    assert err.count("training ") == 2
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| 3")]
    assert [row[1] for row in rows] == ["lora", "head"]
    assert "- seed 3: head over lora: " in out
    record = json.loads((tmp_path / "out" / "tiny.json").read_text())
    found = record["seeds"]["3"]
    scores = found["reports"]["lora"]["scores"]["test"]
    assert found["comparison"]["bundles"][0]["scores"] == scores
    assert compare_methods.table(record) == out.rstrip("\n")

    compare_methods.main(**options)
    again, err = capfd.readouterr()
    assert "training" not in err
    assert [row.split(" | ")[:4] for row in again.splitlines()[2:4]] == [row[:4] for row in rows]
    with pytest.raises(typer.BadParameter, match="was made otherwise"):
        compare_methods.main(**options, overrides=["train.steps=3"])
    with pytest.raises(typer.BadParameter, match="no method ia3; there are lora, int8, head, full"):
        compare_methods.main(**options | {"method": ["ia3"]})
