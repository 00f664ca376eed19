"""The commands about bundles as a user types them, on a tiny base; and signals in the middle of a run."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lowres_ft.bundle import Bundle
from lowres_ft.pipeline import run
from tests import tiny_chat
from tests.conftest import Command, recipe

Bases = Callable[..., Path]
Trainer = Callable[..., Bundle]


def test_predict_prints_a_line_for_each_text(lowres: Command, trained: Trainer):
    folder = trained().folder
    code, out, _ = lowres("predict", folder, "the film was good", "dull\x1b[2J\nand long", "-q")
    assert code == 0
    lines = [line.split("\t") for line in out.splitlines()]
    assert [line[2] for line in lines] == ["the film was good", "dull [2J and long"]
    assert all(line[0] in ("bad", "good") and 0.5 <= float(line[1]) <= 1 for line in lines)


def test_predict_reads_standard_input_and_files_and_writes_json(lowres: Command, trained: Trainer, tmp_path: Path):
    folder = trained().folder
    _, typed, _ = lowres("predict", folder, "-", "--json", "-q", typed="a good film\n\n很好 👍\n".encode())
    _, same, _ = lowres("predict", folder, "--file", "-", "--json", "-q", typed="a good film\n很好 👍\n".encode())
    assert typed == same
    found = [json.loads(line) for line in typed.splitlines()]
    assert [one["text"] for one in found] == ["a good film", "很好 👍"]
    assert set(found[0]) == {"text", "label", "scores"}
    (tmp_path / "in.csv").write_text('text,label\n"two\nlines",good\nfine,bad\n')
    code, out, _ = lowres("predict", folder, "--file", tmp_path / "in.csv", "--json", "--out", tmp_path / "out", "-q")
    assert (code, out) == (0, "")
    written = [json.loads(line)["text"] for line in (tmp_path / "out").read_text().splitlines()]
    assert written == ["two\nlines", "fine"]
    _, marked, _ = lowres("predict", folder, "-", "--json", "-q", typed=b"\xef\xbb\xbfa good film\n")
    assert json.loads(marked)["text"] == "a good film"


@pytest.mark.parametrize("name", ["table.csv", "table.tsv"])
def test_a_table_of_predictions_is_read_as_it_was_meant(name: str, lowres: Command, trained: Trainer, tmp_path: Path):
    texts = ["two\nlines", "carriage\rreturn", 'a "quote"', "a,b\tc;d"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = tmp_path / name
    assert lowres("predict", trained().folder, "--file", tmp_path / "in.jsonl", "--out", out, "-q")[0] == 0
    with out.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file, delimiter="\t" if name.endswith("tsv") else ",")
    assert [row[header.index("text")] for row in rows] == texts


def test_a_place_that_cannot_be_written_is_told_before_a_model_is_loaded(
    lowres: Command, trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = trained().folder  # which is loaded as it is made
    monkeypatch.setattr(Bundle, "load", lambda *_, **__: pytest.fail("it was loaded"))
    code, _, errors = lowres("predict", folder, "a film", "--out", tmp_path / "none" / "x.csv")
    assert code == 2
    assert "there is no folder" in errors


def test_a_table_of_answers_holds_nothing_else(lowres: Command, chat_bases: Bases, chats: Path, tmp_path: Path):
    run(tiny_chat.recipe(chat_bases(), chats), tmp_path / "bundle", device_name="cpu")
    out = tmp_path / "table.csv"
    assert lowres("predict", tmp_path / "bundle", "What is 1?", "And 2?", "--out", out, "-q")[:2] == (0, "")
    with out.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["messages", "answer"]
    assert [json.loads(messages)[0]["content"] for messages, _ in rows] == ["What is 1?", "And 2?"]


@pytest.mark.parametrize(
    ("arguments", "typed", "message"),
    [
        (["--file", "none.csv"], b"", "error: no file none.csv"),
        (["-"], b"good\n\xff\xfe\n", "error: standard input is not utf-8"),
        (["bad \udcff byte"], b"", "error: text 1 is not UTF-8 (at character 5)"),
    ],
)
def test_what_cannot_be_predicted_is_one_error(
    lowres: Command, trained: Trainer, arguments: list[str], typed: bytes, message: str
):
    code, out, err = lowres("predict", trained().folder, *arguments, "-q", typed=typed)
    assert code == 2
    assert out == ""
    assert err.startswith(message)
    assert "hint:" in err


def test_dtype_float32_is_the_unquantized_base(lowres: Command, trained: Trainer):
    folder = trained("bert", "model.quantize=int8", "train.steps=10").folder
    scores = []
    for options in ([], ["--dtype", "float32"]):
        _, out, _ = lowres("predict", folder, "the film was good", "--json", "-q", *options)
        scores.append(json.loads(out)["scores"]["good"])
    assert 0 < abs(scores[0] - scores[1]) < 0.1


def test_evaluate_verify_merge_and_base(lowres: Command, trained: Trainer, bases: Bases, reviews: Path, tmp_path: Path):
    bundle = trained()
    report = json.loads((bundle.folder / "report.json").read_text())
    code, out, _ = lowres("evaluate", bundle.folder, "--json")
    assert code == 0
    assert json.loads(out) == report["scores"]["test"]
    code, out, _ = lowres("evaluate", bundle.folder, "--data", reviews)
    assert code == 0
    assert out.startswith("accuracy ")
    assert "rows 30" in out
    code, out, _ = lowres("verify", bundle.folder)
    assert code == 0
    assert "logits of 4 probe rows are bit-equal" in out
    code, out, _ = lowres("merge", bundle.folder, tmp_path / "merged", "--json")
    assert code == 0
    assert json.loads(out)["flipped"] == 0
    code, out, err = lowres("merge", bundle.folder, tmp_path / "merged")
    assert (code, out) == (2, "")
    assert "merged exists" in err
    code, out, _ = lowres("base", bases("bert"), "--json")
    assert json.loads(out) == {"folder": str(bases("bert")), "name": str(bases("bert")), "revision": None}


@pytest.mark.parametrize("command", ["evaluate", "predict", "verify", "merge"])
def test_what_is_no_bundle_is_one_error(lowres: Command, tmp_path: Path, command: str):
    more = {"predict": ["text"], "merge": [str(tmp_path / "out")]}.get(command, [])
    code, out, err = lowres(command, tmp_path, *more)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {tmp_path} holds no lowres.json")


def test_recipe_prints_scores_beside_the_baselines(
    lowres: Command, bases: Bases, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(recipe(bases(), reviews).to_yaml())
    code, out, err = lowres("recipe", "mine.yaml", "train.steps=3", "--device", "cpu")
    assert code == 0
    assert "test (6 rows): accuracy 0." in out
    assert "TF-IDF + logistic regression accuracy" in out
    assert "bundle runs/tiny" in out
    assert "step 3: validation accuracy" in err
    code, out, err = lowres("recipe", "mine.yaml", "--device", "cpu", "-q", "--json")
    assert err == ""
    assert json.loads(out)["bundle"] == "runs/tiny-2"
    code, out, _ = lowres("recipe", "mine.yaml", "--dry-run", "-q")
    assert code == 0
    assert "nothing was trained" in out
    assert sorted(path.name for path in Path("runs").iterdir()) == ["tiny", "tiny-2"]


def test_an_error_in_mid_training_says_what_is_kept(
    lowres: Command, bases: Bases, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(recipe(bases(), reviews).to_yaml())
    overrides = ["train.steps=50", "train.learning_rate=1e30", "train.clip=null"]
    code, out, err = lowres("recipe", "mine.yaml", *overrides, "-q", "--device", "cpu")
    assert (code, out) == (2, "")
    assert "is not finite" in err
    assert "runs/tiny.run keeps plan.json and metrics.jsonl" in err


def test_a_signal_ends_a_run_at_its_default_place_cleanly(bases: Bases, reviews: Path, tmp_path: Path):
    """As at any place, and as any signal does: see test_signals."""
    (tmp_path / "mine.yaml").write_text(recipe(bases(), reviews, "train.steps=100000").to_yaml())
    command = [sys.executable, "-m", "lowres_ft", "recipe", "mine.yaml", "--device", "cpu", "-q"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    metrics = tmp_path / "runs" / "tiny.run" / "metrics.jsonl"
    limit = time.monotonic() + 60
    while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < limit:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[0] == "interrupted"
    assert "no bundle was written; runs/tiny.run keeps the run up to step " in err
    assert not (tmp_path / "runs" / "tiny").exists()
    assert json.loads(metrics.read_text().splitlines()[-1])["number"] >= 1


def test_predict_and_evaluate_of_any_number_of_labels(lowres: Command, bases: Bases, tmp_path: Path):
    texts = [("warm and good", "good;high"), ("dull", ""), ("warm but dull", "high"), ("a good film", "good")]
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"{text} n{n},{own}\n" for n in range(10) for text, own in texts))
    changes = ("task.multi_label=true", "task.labels=[good, high]", "task.thresholds={good: 0.0001, high: 0.0001}")
    folder = run(recipe(bases(), rows, *changes), tmp_path / "bundle", device_name="cpu").folder
    code, out, _ = lowres("predict", folder, "warm\tand good", "-q")
    labels, scores, text = out.rstrip("\n").split("\t")
    assert (code, sorted(labels.split(", ")), text) == (0, ["good", "high"], "warm and good")
    assert list(map(float, scores.split(", "))) == sorted(map(float, scores.split(", ")), reverse=True)
    _, out, _ = lowres("predict", folder, "warm and good", "-q", "--json")
    assert list(json.loads(out)) == ["text", "labels", "scores"]
    code, out, _ = lowres("evaluate", folder, "--data", rows, "-q")
    assert (code, out.startswith("f1_micro         ")) == (0, True)
    assert "threshold 0.000  rows 20" in out


def test_predict_of_pairs_wants_a_file(lowres: Command, bases: Bases, tmp_path: Path):
    lines = [f"good n{n},{('dull', 'fine')[n % 2]},{('bad', 'good')[n % 2]}\n" for n in range(40)]
    (tmp_path / "rows.csv").write_text("text,pair,label\n" + "".join(lines))
    wanted = recipe(bases(), tmp_path / "rows.csv", "task.pairs=true")
    folder = run(wanted, tmp_path / "bundle", device_name="cpu").folder
    code, _, told = lowres("predict", folder, "a text", "-q")
    assert (code, "error: text 1 is a text alone" in told, "--file F" in told) == (2, True, True)
    code, out, _ = lowres("predict", folder, "--file", tmp_path / "rows.csv", "-q")
    assert (code, len(out.splitlines())) == (0, 40)
    assert out.splitlines()[0].split("\t")[2:] == ["good n0", "dull"]


def test_a_class_may_be_called_like_an_end_of_an_interval(lowres: Command, bases: Bases, tmp_path: Path):
    lines = [f"good n{n},{('low', 'high')[n % 2]}\n" for n in range(40)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(lines))
    wanted = recipe(bases(), tmp_path / "rows.csv", "task.labels=[low, high]")
    folder = run(wanted, tmp_path / "bundle", device_name="cpu").folder
    code, out, _ = lowres("evaluate", folder, "-q")
    assert (code, "  low  " in out) == (0, True)


def test_predict_refuses_a_text_of_which_cleaning_leaves_nothing(lowres: Command, bases: Bases, tmp_path: Path):
    lines = [f"<b>good</b> n{n},{('bad', 'good')[n % 2]}\n" for n in range(40)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(lines))
    wanted = recipe(bases(), tmp_path / "rows.csv", "data.clean=[strip_html]")
    folder = run(wanted, tmp_path / "bundle", device_name="cpu").folder
    code, _, told = lowres("predict", folder, "<br>", "-q")
    assert (code, "error: text 1: the text is empty after cleaning (data.clean)" in told) == (2, True)
