"""report.html: one file that needs nothing else, and shows every text as text."""

import html
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lowres_ft import page
from lowres_ft.bundle import Bundle, open_bundle
from lowres_ft.pipeline import run
from lowres_ft.verdict import sentence
from tests import tiny_chat
from tests.conftest import recipe

Bases = Callable[..., Path]
Trainer = Callable[..., Bundle]
ACTING = "\x1b[2J\u202egnp.exe\u202c\u2066"
HOSTILE = f"</td><script>alert(1)</script><img src=//evil onerror=x>{ACTING}" + "{{ 7*7 }}{% raw %}$x_$&amp;"


class Reader(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, written: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self.open: list[str] = []
        self.feed(written)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.said.append(data)

    @property
    def text(self) -> str:
        return "".join(self.said)


def safe(written: str) -> Reader:
    """A page that asks for nothing, runs nothing, and holds no mark that acts."""
    read = Reader(written)
    for tag, attributes in read.tags:
        assert tag not in ("script", "img", "iframe", "object", "embed", "link", "form", "base", "a", "audio", "video")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "srcset"):
                assert (value or "").startswith("#"), (tag, name, value)
            if name == "style":
                assert "url(" not in (value or "")
    (policy,) = [attributes["content"] for _, attributes in read.tags if attributes.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert not re.search(r"(?:url\(|@import)[^)]*//", written)
    assert all(mark.isprintable() or mark == "\n" for mark in written)
    assert len(written.encode()) < 1_000_000
    return read


def report_of(bundle: Bundle) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle.folder / "report.json").read_text())
    return found


def hostile_rows(path: Path) -> Path:
    rows = [
        {"text": f"the film number{n} was {'good' if n % 2 else 'bad'} {HOSTILE}", "label": f"{n % 2}{HOSTILE}"}
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# One for each task


def test_a_page_of_classification(trained: Trainer):
    bundle = trained("bert", "data.validation=0.4", "train.evaluate_every=1")
    written = (bundle.folder / "report.html").read_text()
    read = safe(written)
    report = report_of(bundle)
    assert page.render(report) == written
    assert sentence(report)[0] in read.text
    for words in ("Scores", "Confusion", "By class", "Calibration", "Answered worst", "Most in doubt", "Lengths"):
        assert words in read.text
    for words in ("training loss", "validation accuracy", "share that is right", "training rows"):
        assert words in read.text
    assert written.count("<svg") == 4
    confusion = [str(count) for row in report["scores"]["test"]["confusion"] for count in row]
    assert re.findall(r"rgba\(var\(--heat\)[^>]*>(\d+)<", written) == confusion


def test_a_page_of_many_labels(bases: Bases, topics: Path, tmp_path: Path):
    wanted = recipe(bases(), topics, "task.multi_label=true", "task.labels=null", "data.validation=0.3")
    bundle = run(wanted, tmp_path / "bundle", device_name="cpu")
    read = safe((bundle.folder / "report.html").read_text())
    assert "threshold" in read.text
    assert "Confusion" not in read.text


def test_a_page_of_entities(bases: Bases, tmp_path: Path):
    rows = [{"words": f"Ann saw York{n} today".split(), "tags": "B-PER O B-LOC O".split()} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = (
        "task.kind=ner",
        "task.labels=null",
        "task.max_length=32",
        "task.overlap=8",
        "data.validation=0.3",
        "data.test=0.3",
    )
    bundle = run(recipe(bases(), tmp_path / "rows.jsonl", *changes), tmp_path / "bundle", device_name="cpu")
    read = safe((bundle.folder / "report.html").read_text())
    assert "By type" in read.text
    assert "right type, wrong borders" in read.text
    errors = report_of(bundle)["errors"]["test"]
    assert set(errors) == {"borders", "type", "both", "invented", "missed"}


def test_a_page_of_chat(chat_bases: Bases, chats: Path, tmp_path: Path):
    bundle = run(tiny_chat.recipe(chat_bases(), chats), tmp_path / "bundle", device_name="cpu")
    read = safe((bundle.folder / "report.html").read_text())
    for words in (
        "perplexity",
        "token accuracy",
        "Answers before and after training",
        "untouched base",
        "Answered worst",
    ):
        assert words in read.text
    assert "Calibration" not in read.text


# What is shown


def test_hostile_texts_and_labels_are_shown_as_texts(bases: Bases, tmp_path: Path):
    changes = (
        "task.labels=null",
        "data.validation=0.3",
        "data.test=0.3",
        f"summary={json.dumps('<script>x</script>{{ 1 }}')}",
    )
    rows = hostile_rows(tmp_path / "rows<b>.jsonl")
    bundle = run(recipe(bases(), rows, *changes), tmp_path / "bundle", device_name="cpu")
    written = (bundle.folder / "report.html").read_text()
    read = safe(written)
    for words in ("<script>alert(1)</script>", r"\u202egnp.exe\u202c", "{{ 7*7 }}", r"\x1b[2J", "$x_$&amp;", r"\u2066"):
        assert words in read.text
    assert "<script>x</script>{{ 1 }}" in read.text
    assert "rows<b>.jsonl" in read.text
    assert "49" not in "".join(re.findall(r"exe[^<]{0,40}", html.unescape(written)))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", "a\u23ce b\u21e5 c"),
        ("\u202eabc\u200b", r"\u202eabc\u200b"),
        ("a\u00a0b\u3000c", "a b c"),
        ("\x00\x7f\u2028", r"\x00\x7f\u2028"),
        ("很好 👍 é ש", "很好 👍 é ש"),
        ("x" * 50, "xxxxxxxxxx ... (50 characters)"),
    ],
)
def test_marks_that_act_are_shown_by_their_escapes(text: str, shown: str):
    assert page.visible(text, 10) == shown


def test_rows_are_held_out_ones_as_many_as_asked_for(trained: Trainer, bases: Bases, reviews: Path, tmp_path: Path):
    report = report_of(trained("bert", "data.report_rows=3"))
    assert report["rows"]["split"] == "test"
    assert [len(report["rows"][rank]) for rank in ("worst", "uncertain")] == [3, 3]
    worst = [row["worst"] for row in report["rows"]["worst"]]
    assert worst == sorted(worst, reverse=True)
    none = trained("bert", "data.report_rows=0", out="none")
    assert report_of(none)["rows"] == {}
    assert "number" not in (none.folder / "report.html").read_text().replace("numbers", "")
    alone = run(recipe(bases(), reviews, "data.test=null"), tmp_path / "alone", device_name="cpu")
    assert report_of(alone)["rows"]["split"] == "validation"
    assert "no baseline was compared" in (alone.folder / "report.html").read_text()


def test_no_row_whose_text_stands_in_train_is_shown(bases: Bases, reviews: Path, tmp_path: Path):
    wanted = recipe(bases(), reviews, f"data.test={reviews}", "data.validation=0.2", "data.report_rows=30")
    report = report_of(run(wanted, tmp_path / "bundle", device_name="cpu"))
    assert len(report["rows"]["worst"]) == 12  # the validation rows, which are the only ones that train has not


def test_nothing_held_out_is_a_page_too(bases: Bases, reviews: Path, tmp_path: Path):
    wanted = recipe(bases(), reviews, "data.test=null", "data.validation=null")
    bundle = run(wanted, tmp_path / "bundle", device_name="cpu")
    assert "No rows were held out" in safe((bundle.folder / "report.html").read_text()).text


# The file


def test_the_page_is_one_of_the_bundles_files(trained: Trainer):
    bundle = trained()
    assert "report.html" in open_bundle(bundle.folder).passport.files


def test_the_largest_report_is_small_enough(trained: Trainer):
    report = report_of(trained("bert", "data.validation=0.4"))
    label = "\u202e<" * 400
    labels = [f"{number}{label}" for number in range(1000)]
    figures = {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 3}
    report["scores"]["test"] |= {
        "classes": dict.fromkeys(labels, figures),
        "confusion": [[1] * 1000 for _ in range(1000)],
    }
    row = {"where": label, "text": label * 2, "wanted": label * 2, "found": label * 2, "worst": 1.0}
    report["rows"] = {"split": "test", "worst": [row] * 30, "uncertain": [row] * 30}
    report["notes"] = [label * 10] * 1000
    report["recipe"]["task"] |= {"labels": labels}
    sample = {"messages": [{"role": "user", "content": label}], "wanted": label, "before": label, "after": label}
    report["samples"] = [sample] * 100
    safe(page.render(report))


def test_two_processes_draw_the_same(trained: Trainer, tmp_path: Path):
    import subprocess
    import sys

    bundle = trained("bert", "data.validation=0.4", "train.evaluate_every=1")
    code = "import json, sys; from lowres_ft import page; print(page.render(json.load(open(sys.argv[1]))), end='')"
    arguments = [sys.executable, "-c", code, str(bundle.folder / "report.json")]
    done = subprocess.run(arguments, capture_output=True, text=True, encoding="utf-8", check=True)
    assert done.stdout == (bundle.folder / "report.html").read_text(encoding="utf-8")
