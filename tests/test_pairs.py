"""Pairs of texts: rows, tokens with segments, and a bundle from end to end."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lowres_ft import data, device
from lowres_ft.batches import collate, in_memory
from lowres_ft.bundle import Bundle, open_bundle
from lowres_ft.errors import DataError, ModelError
from lowres_ft.merging import merge
from lowres_ft.pipeline import run
from lowres_ft.prediction import Predictor, examples
from lowres_ft.tasks.classification import Classification, Text
from tests import tiny
from tests.conftest import prepare, recipe
from tests.test_round_trip import compare
from tests.test_train import gradients, randomize

Bases = Callable[..., Path]
CPU = device.find("cpu")
TASK = Classification(labels=("bad", "good"), pairs=True)
TEXTS = [["the film was good", "dull and long"], ["awful", "a great plot but short"], ["fine", "fine"]]


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of a good text and a bad one, labelled by the second: a perfect score needs to know which is which."""
    path, drawn = tmp_path_factory.mktemp("pairs") / "compared.csv", random.Random(1)
    others = [word for word in tiny.WORDS if word not in tiny.GOOD + tiny.BAD]
    lines = ["first,second,label"]
    for number in range(300):
        words = [drawn.choice(tiny.GOOD), drawn.choice(tiny.BAD)]
        words.reverse() if number % 2 else None
        first, second = (" ".join([*drawn.sample(others, drawn.randrange(3)), word]) for word in words)
        lines.append(f"{first} n{number},{second},{'good' if number % 2 else 'bad'}")
    path.write_text("\n".join(lines) + "\n")
    return path


def wanted(base: Path, rows: Path, *overrides: str):
    mapped = ("task.pairs=true", "data.columns.text=first", "data.columns.pair=second")
    return recipe(base, rows, *mapped, *overrides)


def test_both_texts_are_read():
    row = {"text": "a film", "pair": "a plot", "label": "good"}
    assert TASK.read(row, "a:1") == Text("a:1", "a film", "good", "a plot")
    assert TASK.read({"text": "a film", "pair": "a plot"}, "a:1") == Text("a:1", "a film", None, "a plot")


@pytest.mark.parametrize(
    ("pair", "message"),
    [(" ", "a:1: the pair is empty"), (None, "a:1: the pair is empty"), (5, "a:1: the pair is 5, which is not text")],
)
def test_a_pair_without_its_second_text_is_refused(pair: object, message: str):
    with pytest.raises(DataError, match=message):
        TASK.read({"text": "fine", "pair": pair, "label": "good"}, "a:1")


def test_a_file_without_the_second_column_is_told(tmp_path: Path):
    (tmp_path / "a.csv").write_text("text,apir,label\na,b,good\n")
    with pytest.raises(DataError, match=r"no column 'pair' \(did you mean 'apir'\?\)") as error:
        data.store(str(tmp_path / "a.csv"), TASK, {}, tmp_path / "a.arrow")
    assert "data.columns.pair=NAME" in error.value.hint


def test_pairs_are_the_same_where_both_texts_are():
    pairs = [("a", "b"), ("b", "a"), ("ab", ""), ("a", "b c"), ("a b", "c"), ("1 a", "b"), ("", "1 ab")]
    keys = [TASK.keys(Text("", text, None, pair)) for text, pair in pairs]
    assert len(set(map(tuple, keys))) == len(pairs)
    assert TASK.keys(Text("x", "a", "good", "b")) == keys[0]
    assert TASK.keys(Text("x", "a")) == ("a",)


def test_a_pair_is_tokenized_as_a_pair_and_the_longer_text_is_cut():
    tokenizer = tiny.tokenizer()
    task = TASK.model_copy(update={"max_length": 9})
    [[encoded]] = task.encode(tokenizer, [Text("", "the plot was not very good and long", "good", "a dull film")])
    assert tokenizer.decode(encoded.ids) == "[CLS] the plot was [SEP] a dull film [SEP]"
    assert encoded.segments == [0] * 5 + [1] * 4
    [[alone]] = Classification(labels=("bad", "good")).encode(tokenizer, [Text("", "fine")])
    assert alone.segments is None


def test_segments_are_padded_and_reach_the_model(bases: Bases, compared: Path, tmp_path: Path):
    prepared = prepare(wanted(bases(), compared), tmp_path)
    adapted, tokens = prepared.adapted, prepared.tokens["train"]
    batch = collate(tokens, np.arange(6), adapted)
    assert batch.segments is not None
    assert (batch.segments.sum(1) > 0).all()
    assert (batch.segments <= batch.mask).all()
    few = list(prepared.tokens["train"].rows.examples(adapted.task))[:6]  # type: ignore[union-attr]
    client = adapted.tokenizer([one.text for one in few], [one.pair for one in few], padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = adapted.model(**client).logits
        torch.testing.assert_close(adapted.task.logits(adapted.model, batch), expected)
        without = adapted.model(input_ids=batch.ids, attention_mask=batch.mask).logits
    assert not torch.allclose(without, expected, atol=1e-2)
    again = in_memory(adapted.task.encode(adapted.tokenizer, few))
    assert torch.equal(collate(again, np.arange(6), adapted).segments, batch.segments)  # type: ignore[arg-type]


def test_single_texts_have_no_segments(bases: Bases, reviews: Path, tmp_path: Path):
    prepared = prepare(recipe(bases(), reviews), tmp_path)
    tokens = prepared.tokens["train"]
    assert tokens.segments is None
    assert collate(tokens, np.arange(3), prepared.adapted).segments is None


def test_every_cut_gives_the_same_gradient(bases: Bases, compared: Path, tmp_path: Path):
    prepared = prepare(wanted(bases(), compared, "train.batch_size=32", "method.dropout=0.1"), tmp_path)
    randomize(prepared)
    whole, parts = gradients(prepared, 10_000), gradients(prepared, 30)
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, parts[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_tokenizer_that_puts_nothing_between_two_texts_is_refused(bases: Bases, compared: Path, tmp_path: Path):
    with pytest.raises(ModelError, match="puts nothing between the two texts of a pair"):
        run(wanted(bases("gpt2"), compared), tmp_path / "bundle", device_name="cpu")


def test_baselines_know_which_text_a_word_is_in(compared: Path, tmp_path: Path):
    rows = data.load(wanted(Path("no-base"), compared), tmp_path)
    assert rows.test is not None
    test = list(rows.test.examples(rows.task))
    outputs = rows.task.baselines(rows.train.examples(rows.task), test, seed=1)["tfidf"].values
    assert [TASK.classes[index] for index in outputs.argmax(1)] == [one.label for one in test]


@pytest.fixture(scope="session")
def bundle(bases: Bases, compared: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    changes = ("train.steps=150", "train.batch_size=16", "train.learning_rate=0.003")
    out = tmp_path_factory.mktemp("pairs") / "bundle"
    return run(wanted(bases(), compared, *changes), out, device_name="cpu")


def test_it_learns_what_can_be_learned(bundle: Bundle):
    assert bundle.passport.scores["test"]["accuracy"]["value"] >= 0.95


def test_its_probe_holds_segments_and_verifies(bundle: Bundle, tmp_path: Path):
    held = load_file(bundle.folder / "probe.safetensors")
    assert set(held) == {"input_ids", "attention_mask", "token_type_ids", "logits"}
    assert open_bundle(bundle.folder).verify(CPU).exact
    assert merge(bundle, tmp_path / "merged", CPU).flipped == 0


def test_it_predicts_pairs_of_a_file_and_refuses_a_bare_text(bundle: Bundle, tmp_path: Path):
    predictor = Predictor(*bundle.load(CPU))
    (tmp_path / "in.jsonl").write_text('{"first": "a good film", "second": "an awful film"}\n')
    [found] = predictor(examples(bundle, str(tmp_path / "in.jsonl")))
    assert list(found) == ["text", "pair", "label", "scores"]
    assert (found["text"], found["pair"], found["label"]) == ("a good film", "an awful film", "bad")
    label, _, text, pair = predictor.adapted.task.line(found).split("\t")
    assert (label, text, pair) == ("bad", "a good film", "an awful film")
    (tmp_path / "in.txt").write_text("a good film\n")
    for predict in (lambda: predictor.texts(["fine"]), lambda: predictor(examples(bundle, str(tmp_path / "in.txt")))):
        with pytest.raises(DataError, match="is a text alone, but this model compares two") as error:
            list(predict())
        assert "--file F" in error.value.hint


def test_its_card_says_to_give_a_file(bundle: Bundle):
    assert "`lowres-ft predict . --file pairs.csv`" in (bundle.folder / "README.md").read_text()
    report = json.loads((bundle.folder / "report.json").read_text())
    assert report["recipe"]["task"]["pairs"] is True


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_it_round_trips_through_a_fresh_process_and_through_peft(
    bases: Bases, compared: Path, tmp_path: Path, quantize: str
):
    names = ("bert", "roberta", "distilbert", "deberta-v2", "electra", "albert", "modernbert")
    recipes = {name: wanted(bases(name), compared, f"model.quantize={quantize}") for name in names}
    compare(recipes, tmp_path, tolerance=1e-5 if quantize == "none" else 0.2, texts=TEXTS)
