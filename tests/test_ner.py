"""Entities: rows and types, word pieces and windows, scores held to seqeval's, predictions and baselines."""

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from seqeval import metrics as seqeval
from torch.nn.functional import log_softmax

from lowres_ft.errors import DataError
from lowres_ft.tasks import _tags
from lowres_ft.tasks._sentence import Sentence
from lowres_ft.tasks.base import IGNORED, Batch, Ragged, Seen
from lowres_ft.tasks.ner import Ner

TASK = Ner(labels=("LOC", "PER"))
ROW = {"words": ["Ann", "likes", "New", "York", "."], "tags": ["B-PER", "O", "B-LOC", "I-LOC", "O"]}
TEXT = {"text": "Ann likes New York.", "entities": [[0, 3, "PER"], {"start": 10, "end": 18, "label": "LOC"}]}


def seen(*labels: str) -> dict[str, Seen]:
    return {label: Seen(2, f"rows.conll:{line}") for line, label in enumerate(labels, start=1)}


def sentence(words: str, tags: str = "") -> Sentence:
    row: dict[str, Any] = {"words": words.split()}
    return TASK.read(row | ({"tags": tags.split()} if tags else {}), "a:1")


# Rows


def test_a_row_of_words_is_a_text_with_single_spaces():
    found = TASK.read(ROW, "a:1")
    assert found.text == "Ann likes New York ."
    assert found.strings == ROW["words"]
    assert found.tags == ROW["tags"]
    assert list(TASK.keys(found)) == ["Ann likes New York ."]
    assert TASK.labels_in(found) == ("LOC", "PER")


def test_a_row_of_text_is_split_and_its_spans_are_tags():
    found = TASK.read(TEXT, "a:1")
    assert (found.strings, found.tags) == (ROW["words"], ROW["tags"])


def test_rows_without_answers_are_read():
    assert TASK.read({"words": ROW["words"]}, "a:1").tags is None
    assert TASK.bare(TEXT["text"], "a:1") == Sentence("a:1", TEXT["text"], TASK.read(TEXT, "").words)
    assert TASK.labels_in(TASK.bare("Ann", "")) == ()


def test_a_word_is_cut_where_an_entity_begins_or_ends_inside_it():
    found = TASK.read({"text": "NewYorkers", "entities": [[0, 7, "LOC"]]}, "")
    assert (found.strings, found.tags) == (["NewYork", "ers"], ["B-LOC", "O"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"words": [], "tags": []}, "the sentence has no words"),
        ({"words": "New York", "tags": ["O", "O"]}, "the words are 'New York', not a list"),
        ({"words": None}, "the words are null, not a list"),
        ({"words": ["New", 5], "tags": ["O", "O"]}, "word 2 is 5, which is not text"),
        ({"words": ["New", " "], "tags": ["O", "O"]}, "word 2 is empty"),
        ({"words": ["New"], "tags": None}, "the tags are null, not a list"),
        ({"words": ["New", "York"], "tags": ["B-LOC"]}, "2 words but 1 tags"),
        ({"words": ["New"], "tags": ["B-LOC", "I-LOC"]}, "1 words but 2 tags"),
        ({"words": ["New", "York"], "tags": ["O", "X-LOC"]}, "word 2 'York' has 'X-LOC', which is no tag"),
        ({"words": ["New", "York"], "tags": ["LOC", "O"]}, "word 1 'New' has 'LOC', which is no tag"),
        ({"words": ["New"], "tags": [3]}, "word 1 'New' has 3, which is no tag"),
        ({"text": "", "entities": []}, "the text is empty"),
        ({"text": "\u3000", "entities": []}, "the text is empty"),
        ({"text": None}, "the text is empty"),
        ({"text": 5, "entities": []}, "the text is 5, which is not text"),
        ({"text": "New York", "entities": [[0, 9, "LOC"]]}, "entity 1: 0-9 leaves the text"),
    ],
)
def test_a_row_that_is_no_example_is_refused(row: dict[str, object], message: str):
    with pytest.raises(DataError, match=f"^a:1: {message}"):
        TASK.read(row, "a:1")


@pytest.mark.parametrize(
    ("tags", "notes"),
    [
        (["B-LOC I-LOC O", "B-LOC B-LOC O"], []),
        (["S-LOC O O", "B-LOC E-LOC O"], []),
        (["O I-LOC I-LOC", "I-LOC B-LOC O"], ["the tags are IOB1, .*first I-LOC, a:1, word 2 'b'.*read as BIO"]),
        (
            ["B-LOC O I-PER", "O I-LOC E-LOC"],
            [r"2 tags go on with .* none begins; .* \(first I-PER, a:1, word 3 'c'\)"],
        ),
        (["O E-LOC O"], ["1 tags go on"]),
    ],
)
def test_tags_that_are_read_as_others_are_told(tags: list[str], notes: list[str]):
    found = list(TASK.notes(sentence("a b c", one) for one in tags))
    assert len(found) == len(notes)
    for told, expected in zip(found, notes, strict=True):
        assert re.search(expected, told)


def test_white_space_that_is_cut_from_spans_is_told():
    rows = [{"text": "New York is", "entities": [[0, 9, "LOC"]]}, {"text": "a b", "entities": [[0, 2, "PER"]]}, TEXT]
    found = [TASK.read(row, "") for row in rows]
    assert found[0].tags == ["B-LOC", "I-LOC", "O"]
    assert list(TASK.notes(found)) == ["2 entities had white space at their ends, which is left out of them"]


# Types


def test_the_classes_are_the_tags_of_the_types():
    assert TASK.names == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    assert Ner().names == ()
    assert TASK.model_config_fields() == {
        "num_labels": 5,
        "id2label": {0: "O", 1: "B-LOC", 2: "I-LOC", 3: "B-PER", 4: "I-PER"},
        "label2id": {"O": 0, "B-LOC": 1, "I-LOC": 2, "B-PER": 3, "I-PER": 4},
    }


def test_types_are_found_by_alphabet_or_keep_their_order():
    assert Ner().resolve(seen("PER", "LOC")).types == ("LOC", "PER")
    assert Ner(labels=("PER", "LOC")).resolve(seen("LOC", "PER")).types == ("PER", "LOC")
    assert [TASK.class_of(label) for label in TASK.types] == [0, 1]
    with pytest.raises(KeyError):
        TASK.class_of("ORG")


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        (Ner(), (), "no training row has an entity"),
        (Ner(), ("Per", "per"), r"^rows.conll:2: the label 'per' differs from 'Per' \(rows.conll:1\) only in"),
        (Ner(), tuple(f"type {n}" for n in range(201)), "more than 200 types of entities, such as 'type 0'"),
        (
            TASK,
            ("LOC", "PRE"),
            r"^rows.conll:2: unknown label 'PRE' \(did you mean 'PER'\?\), 2 rows$",
        ),
        (TASK, ("LOC",), "^task.labels names 'PER', which no training row has"),
    ],
)
def test_types_that_make_no_task_are_told(task: Ner, labels: tuple[str, ...], message: str):
    with pytest.raises(DataError, match=message):
        task.resolve(seen(*labels))


def test_many_unknown_types_of_held_out_rows_are_cut_in_messages():
    with pytest.raises(DataError) as error:
        TASK.check(seen(*(f"T{n}" for n in range(14))))
    assert error.value.message.count("unknown label") == 10
    assert error.value.message.endswith("\n  and 4 more")
    assert "task.labels names 'LOC', 'PER'" in error.value.hint


@pytest.mark.parametrize(
    ("labels", "message"),
    [((), "at least one type"), (("a", "a"), "name a type twice"), (("a", " "), "an empty name")],
)
def test_types_of_a_recipe_that_make_no_task_are_refused(labels: tuple[str, ...], message: str):
    with pytest.raises(ValidationError, match=message):
        Ner(labels=labels)


# Loss, scores and answers


def test_the_loss_is_a_sum_over_words_in_single_precision_and_padding_has_no_logits():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.tensor([[1, IGNORED, 4], [IGNORED, 0, IGNORED]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    batch = Batch(ids=torch.zeros(2, 3), mask=mask, targets=targets, rows=torch.arange(2))
    model = lambda **_: SimpleNamespace(logits=logits)  # noqa: E731
    expected = -sum(log_softmax(logits[at].float(), 0)[k] for at, k in (((0, 0), 1), ((0, 2), 4), ((1, 1), 0)))
    loss = TASK.loss(model, batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    assert (TASK.logits(model, batch) == 0).all(-1).tolist() == [[False] * 3, [False, False, True]]
    torch.testing.assert_close(TASK.outputs(model, batch), logits.float())


def outputs_of(tags: list[list[str]], task: Ner = TASK) -> Ragged:
    sure = np.eye(len(task.names), dtype=np.float32)
    return Ragged.of([sure[[task.names.index(tag) for tag in row]] for row in tags])


def random_tags(seed: int, rows: int = 20) -> tuple[list[list[str]], list[list[str]]]:
    """True tags in BIO, and others that are like them and break its rules."""
    random = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(rows):
        true = random.choice(5, size=random.integers(1, 12), p=[0.4, 0.15, 0.15, 0.15, 0.15])
        other = np.where(random.random(len(true)) < 0.3, random.integers(0, 5, len(true)), true)
        truth.append(_tags.to_bio([TASK.names[index] for index in true]))
        found.append([TASK.names[index] for index in other])
    return truth, found


@pytest.mark.parametrize("seed", range(25))
def test_scores_are_seqevals(seed: int):
    truth, found = random_tags(seed)
    classes = Ragged.of([np.array([TASK.names.index(tag) for tag in row]) for row in truth])
    evidence = TASK.evidence(classes, outputs_of(found))
    assert evidence.shape == (20, 2, 3)
    assert TASK.metrics(evidence) == pytest.approx(
        {
            name: getattr(seqeval, f"{name}_score")(truth, found, zero_division=0)
            for name in ("f1", "precision", "recall")
        }
    )
    report = seqeval.classification_report(truth, found, output_dict=True, zero_division=0)
    for label, scores in TASK.details(evidence)["types"].items():
        expected = report.get(label, {"precision": 0, "recall": 0, "f1-score": 0, "support": 0})
        assert list(scores) == ["precision", "recall", "f1", "support"]
        assert list(scores.values()) == pytest.approx(
            [expected[n] for n in ("precision", "recall", "f1-score", "support")]
        )
    for row in range(len(truth)):  # each row's part is its own
        alone = TASK.evidence(classes.take(np.array([row])), outputs_of([found[row]]))
        assert (alone[0] == evidence[row]).all()


def test_scores_without_any_entity_are_nothing():
    evidence = TASK.evidence(Ragged.of([np.zeros(3, dtype=np.int64)]), outputs_of([["O", "O", "O"]]))
    assert TASK.metrics(evidence) == {"f1": 0, "precision": 0, "recall": 0}
    assert next(iter(TASK.metrics(evidence))) == TASK.metric


def test_a_prediction_is_spans_of_the_text_as_given():
    example = TASK.bare("  Ann likes\tNew  York!", "")
    logits = np.log(
        [
            [0.1, 0.1, 0.1, 0.6, 0.1],
            [0.6, 0.1, 0.1, 0.1, 0.1],
            [0.1, 0.5, 0.2, 0.1, 0.1],
            [0.1, 0.1, 0.7, 0.05, 0.05],
            [0.6, 0.1, 0.1, 0.1, 0.1],
        ]
    )
    found = TASK.prediction(example, logits.astype(np.float32))
    assert found["text"] == "  Ann likes\tNew  York!"
    assert found["entities"] == [
        {"start": 2, "end": 5, "label": "PER", "score": pytest.approx(0.6), "text": "Ann"},
        {"start": 12, "end": 21, "label": "LOC", "score": pytest.approx(0.6), "text": "New  York"},
    ]
    assert TASK.line(found) == "  Ann likes New  York!\tAnn [PER 0.600]\tNew  York [LOC 0.600]"
    assert TASK.line({"text": "a\nb", "entities": []}) == "a b"


def test_the_baselines_know_no_entity_and_those_of_train():
    train = [
        sentence("New York likes Ann", "B-LOC I-LOC O B-PER"),
        sentence("Ann likes York york", "B-PER O B-LOC B-LOC"),
        sentence("may likes Will", "O O B-PER"),
        sentence("will May come in May to WILL", "O B-PER O O O O B-PER"),
    ]
    test = [sentence("so New York and York will May Will"), sentence("New Ann")]
    found = TASK.baselines(train, test, seed=1)
    assert list(found) == ["majority", "gazetteer"]
    tags = {name: [[TASK.names[i] for i in row.argmax(1)] for row in rows] for name, rows in found.items()}
    assert tags["majority"] == [["O"] * 8, ["O"] * 2]
    assert tags["gazetteer"] == [["O", "B-LOC", "I-LOC", "O", "B-LOC", "B-PER", "O", "B-PER"], ["O", "B-PER"]]


def test_baselines_of_training_rows_without_a_phrase_that_is_known_find_nothing():
    found = TASK.baselines([sentence("a a a", "B-LOC O O")], [sentence("a")], seed=1)
    assert found["gazetteer"].values.argmax(1).tolist() == [0]
