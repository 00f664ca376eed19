"""Runs of entity recognition on tiny bases: learned, scored, saved, loaded elsewhere, merged and asked."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from seqeval.metrics import f1_score

from lowres_ft import data, device, evaluate
from lowres_ft.batches import tokenize
from lowres_ft.bundle import Bundle
from lowres_ft.cli import summary
from lowres_ft.cli.main import main
from lowres_ft.errors import DataError
from lowres_ft.evaluate import Value
from lowres_ft.merging import merge
from lowres_ft.pipeline import run
from lowres_ft.prediction import Predictor, evaluate_bundle
from lowres_ft.recipe import Recipe, parse
from lowres_ft.tasks import _tags
from tests import tiny
from tests.test_round_trip import compare

Bases = Callable[..., Path]
CPU = device.find("cpu")
NAMES = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
PLAIN = [word for word in tiny.WORDS if word not in (*tiny.GOOD, *tiny.BAD, "long", "short")]


def sentences(rows: int = 200) -> list[tuple[list[str], list[str]]]:
    """Sentences in which a person is a good word, `long` behind it or not, and a place a bad one with `short`."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(rows):
        words, tags = [], []
        for _ in range(random.integers(5)):
            filler = random.choice(PLAIN, random.integers(1, 4)).tolist()
            kind, names, second = [("PER", tiny.GOOD, "long"), ("LOC", tiny.BAD, "short")][random.integers(2)]
            entity = [str(random.choice(names)), *[second] * random.integers(2)]
            words += [*filler, *entity]
            tags += ["O"] * len(filler) + [f"B-{kind}", *[f"I-{kind}"] * (len(entity) - 1)]
        found += [(words, tags)] if words else []
    return found


@pytest.fixture(scope="module")
def conll(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sentences, a word and its tag on a line."""
    path = tmp_path_factory.mktemp("ner") / "train.conll"
    blocks = ["\n".join(f"{word} {tag}" for word, tag in zip(*one, strict=True)) for one in sentences()]
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def spans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sentences as texts with spans of characters."""
    path = tmp_path_factory.mktemp("ner") / "train.jsonl"
    lines = []
    for words, tags in sentences():
        classes = np.array([NAMES.index(tag) for tag in tags])
        starts = np.cumsum([0, *(len(word) + 1 for word in words)])
        entities = [
            [int(starts[first]), int(starts[last]) - 1, "LOC PER".split()[kind]]
            for first, last, kind in _tags.entities(classes, np.zeros(len(classes))).tolist()
        ]
        lines.append(json.dumps({"text": " ".join(words), "entities": entities}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def recipe(base: Path, rows: Path, *overrides: str) -> Recipe:
    """Two steps of LoRA in fp32, unless overridden."""
    raw = {
        "name": "tiny",
        "task": {"kind": "ner", "max_length": 32, "overlap": 8},
        "model": {"base": str(base), "dtype": "float32"},
        "method": {"kind": "lora", "rank": 4},
        "data": {"train": str(rows), "test": 0.2, "probe_rows": 4},
        "train": {"steps": 2, "batch_size": 8, "learning_rate": 0.01},
    }
    return parse(raw, overrides)


LEARN = ("train.steps=300", "train.evaluate_every=300", "task.max_length=16")


@pytest.fixture(scope="module")
def learned(bases: Bases, conll: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that has learned all that there is, from texts cut into windows."""
    return run(recipe(bases("bert"), conll, *LEARN), tmp_path_factory.mktemp("learned") / "bundle", device_name="cpu")


@pytest.mark.parametrize("source", ["conll", "spans"])
def test_what_can_be_learned_is_learned(bases: Bases, source: str, request: pytest.FixtureRequest, tmp_path: Path):
    rows: Path = request.getfixturevalue(source)
    full = ("method.kind=full", "train.learning_rate=0.002")
    bundle = run(recipe(bases("bert"), rows, *LEARN, *full), tmp_path / "bundle", device_name="cpu")
    scores = bundle.passport.scores["test"]
    assert bundle.passport.labels == NAMES
    assert scores["f1"]["value"] > 0.99
    assert list(scores) == ["f1", "precision", "recall", "types"]
    report = json.loads((bundle.folder / "report.json").read_text())
    assert report["baselines"]["majority"]["f1"]["value"] == 0
    assert 0.5 < report["baselines"]["gazetteer"]["f1"]["value"] < scores["f1"]["low"]
    table = summary.scores_table(scores)
    assert "  PER            precision 1.000  recall" in table or "  PER            precision 0.9" in table
    assert f"entities {scores['types']['PER']['support']}" in table


def test_scores_of_a_run_are_seqevals_on_whole_texts(learned: Bundle, tmp_path: Path):
    adapted, plan = learned.load(CPU)
    rows = data.load(learned.recipe, tmp_path).test
    assert rows is not None
    tokens = tokenize(adapted, rows, tmp_path / "rows")
    assert len(tokens.lengths) > len(tokens)  # some texts have several windows
    outputs = evaluate.outputs(adapted, tokens, plan)
    truth = [_tags.to_bio(example.tags) for example in rows.examples(learned.recipe.task)]
    noise = np.random.default_rng(0).normal(size=outputs.values.shape) * 4
    for values in (outputs.values, outputs.values + noise):
        predicted = type(outputs)(values, outputs.starts)
        tags = [[NAMES[index] for index in row.argmax(1)] for row in predicted]
        assert [len(row) for row in tags] == [len(row) for row in truth]
        found = evaluate.score(learned.recipe.task, tokens.truth, predicted).metrics["f1"]
        assert found.value == pytest.approx(f1_score(truth, tags))
        assert found.low <= found.value <= found.high
    recorded = Value.model_validate(learned.passport.scores["test"]["f1"])
    assert evaluate_bundle(learned, adapted, plan, tmp_path).metrics["f1"] == recorded


def test_a_bundle_answers_with_spans_of_the_text(learned: Bundle):
    predictor = Predictor(*learned.load(CPU))
    long = "the film was very good but " * 12 + "bad short plot"
    texts = ["  a great\tplot was dull  short and", "the film was very a plot", "warm long cold", long]
    found = list(predictor.texts(texts))
    assert [one["text"] for one in found] == texts
    entities = [[(e["text"], e["label"]) for e in one["entities"]] for one in found]
    assert entities[:3] == [
        [("great", "PER"), ("dull  short", "LOC")],
        [],
        [("warm long", "PER"), ("cold", "LOC")],
    ]
    assert entities[3] == [("good", "PER")] * 12 + [("bad short", "LOC")]
    for one in found:
        for entity in one["entities"]:
            assert one["text"][entity["start"] : entity["end"]] == entity["text"]
            assert 0 < entity["score"] <= 1


def test_the_commands_know_entities(
    learned: Bundle, conll: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def lowres(*arguments: object) -> list[str]:
        monkeypatch.setattr("sys.argv", ["lowres-ft", *map(str, arguments), "-q"])
        with pytest.raises(SystemExit, match="0"):
            main()
        return capsys.readouterr().out.splitlines()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert lowres("predict", learned.folder, "a great\tplot was dull short and")[0].startswith(
            "a great plot was dull short and\tgreat [PER 0."
        )
        found = [json.loads(line) for line in lowres("predict", learned.folder, "--file", conll, "--json")]
        assert [one["text"] for one in found] == [" ".join(words) for words, _ in sentences()]
        table = lowres("evaluate", learned.folder)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert [line.split()[0] for line in table] == ["f1", "precision", "recall", "LOC", "PER"]


def test_a_bundle_verifies_and_merges(learned: Bundle, tmp_path: Path):
    verified = learned.verify(CPU)
    assert verified.exact
    assert verified.largest_difference == 0
    merged = merge(learned, tmp_path / "merged", CPU)
    assert merged.rows > 32  # windows of the 32 test texts
    assert merged.flipped == 0
    assert merged.metric == pytest.approx(learned.passport.scores["test"]["f1"]["value"])


def test_bundles_round_trip_through_a_fresh_process_and_through_peft(bases: Bases, conll: Path, tmp_path: Path):
    names = ("bert", "roberta", "deberta-v2", "modernbert", "gpt2", "llama", "qwen3")
    wanted = {name: recipe(bases(name), conll, "method.dropout=0.1") for name in names}
    wanted |= {f"{kind} bert": recipe(bases("bert"), conll, f"method.kind={kind}") for kind in ("head", "full")}
    bundles = compare(wanted, tmp_path, labels=NAMES)
    for name, folder in bundles.items():
        if name in names:
            assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"


def test_int8_round_trips_and_merges(bases: Bases, conll: Path, tmp_path: Path):
    wanted = {name: recipe(bases(name), conll, "model.quantize=int8") for name in ("bert", "llama")}
    compare(wanted, tmp_path, tolerance=0.2, labels=NAMES)
    bundle = run(wanted["bert"], tmp_path / "bundle", device_name="cpu")
    merged = merge(bundle, tmp_path / "merged", CPU)
    assert merged.from_measured is not None


def test_an_entity_type_that_only_test_has_is_told_with_its_place(bases: Bases, conll: Path, tmp_path: Path):
    test = tmp_path / "test.conll"
    test.write_text("the O\nfilm O\n\na O\nplot B-ORG\n")
    with pytest.raises(DataError, match=rf"^{test}:4: unknown label 'ORG', 1 row$"):
        run(recipe(bases("bert"), conll, f"data.test={test}"), tmp_path / "bundle", device_name="cpu")


def test_wrong_rows_of_a_file_are_told_together(bases: Bases, tmp_path: Path):
    path = tmp_path / "train.conll"
    path.write_text("the O\nfilm X-LOC\n\na O\nplot B-LOC\n\ngood PER\n")
    with pytest.raises(DataError) as error:
        data.load(recipe(bases("bert"), path), tmp_path)
    first, second = error.value.message.split("\n  ")
    assert first == f"{path}:1: word 2 'film' has 'X-LOC', which is no tag"
    assert second == f"{path}:7: word 1 'good' has 'PER', which is no tag"


def test_another_scheme_is_told_once_for_each_source(bases: Bases, conll: Path, tmp_path: Path):
    iob1 = tmp_path / "iob1.conll"
    iob1.write_text(conll.read_text().replace(" B-", " I-"))
    found = data.load(recipe(bases("bert"), conll, f"data.test={iob1}"), tmp_path)
    assert [note for note in found.notes if "IOB1" in note] == [
        note for note in found.notes if note.startswith("test: ")
    ]
    assert any(note.startswith("test: the tags are IOB1") for note in found.notes)
