"""The comparison of quality: gaps by hand, the table, and a run on a tiny base that goes on where it was cut off."""

import json

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

import lowres_ft
from benchmarks import quality
from tests.conftest import recipe


def test_the_gap_is_paired_and_texts_are_what_is_drawn():
    theirs = {str(row): row % 2 == 0 for row in range(400)}
    better = {**theirs, "1": True, "3": True}
    found = quality.gap([better, better], [theirs, theirs])
    assert found.value == pytest.approx(2 / 400)
    assert 0 <= found.low < found.value < found.high < 0.02
    twice = quality.gap([better], [theirs])  # a seed that says the same again makes nothing surer
    assert (twice.low, twice.high) == (found.low, found.high)
    assert quality.gap([theirs], [theirs]) == quality.Gap(0, 0, 0)


def test_other_rows_are_no_pair():
    with pytest.raises(ValueError, match="same rows"):
        quality.gap([{"a": True}], [{"b": True}])


def test_a_loss_that_is_not_excluded_is_told():
    few = {str(row): True for row in range(50)}
    record = quality.summary({"bf16": [few], "int8": [{**few, "1": False}], "nf4": [few]}, [7])
    console = Console(width=160, record=True)
    console.print(quality.shown(record))
    told = {line.split("│")[1].strip(): line for line in console.export_text().splitlines() if "│" in line}
    assert "not excluded" in told["int8"]
    assert "-0.0200" in told["int8"]
    assert "not excluded" not in told["nf4"]


def test_what_was_answered_is_not_trained_again(tmp_path, bases, reviews, monkeypatch):
    monkeypatch.setattr(quality, "VARIANTS", {"bf16": quality.Variant("mine"), "int8": quality.Variant("mine")})
    monkeypatch.setattr(lowres_ft, "load_recipe", lambda _name, changes: recipe(bases(), reviews, *changes))
    trained = []
    run = lowres_ft.run
    monkeypatch.setattr(lowres_ft, "run", lambda *args: trained.append(args[1].name) or run(*args))
    app = typer.Typer()
    app.command()(quality.main)
    (tmp_path / "int8-1.answers.json").write_text("{}")
    (tmp_path / "bf16-1.answers.json").unlink(missing_ok=True)
    command = ["--seeds", "1", "--variant", "int8", "--work", str(tmp_path)]
    assert isinstance(CliRunner().invoke(app, command).exception, (ValueError, ZeroDivisionError))
    assert trained == ["bf16-1"]
    (tmp_path / "int8-1.answers.json").write_bytes((tmp_path / "bf16-1.answers.json").read_bytes())
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert trained == ["bf16-1"]
    assert json.loads((tmp_path / "quality.json").read_text())["variants"]["int8"]["gap"]["value"] == 0
