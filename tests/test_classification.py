"""Text classification: labels and classes, tokens and targets, the loss, predictions and baselines."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn.functional import cross_entropy, log_softmax

from lowres_ft import data, yaml12
from lowres_ft.errors import DataError, RecipeError
from lowres_ft.recipe import parse
from lowres_ft.tasks.base import IGNORED, Batch, Seen
from lowres_ft.tasks.classification import MOST_LABELS, Classification, Text
from tests import tiny
from tests.conftest import prepare, recipe
from tests.test_train import gradients, randomize

TASK = Classification(labels=("bad", "good"))
TRAIN = [
    Text("", text, label)
    for text, label in [("a dull film", "bad"), ("a great film", "good"), ("很好看", "good"), ("great :)", "good")]
]


def seen(*labels: str) -> dict[str, Seen]:
    return {label: Seen(2, f"rows.csv:{line}") for line, label in enumerate(labels, start=2)}


@pytest.mark.parametrize(
    ("names", "label", "index"),
    [
        (("bad", "good"), "good", 1),
        (("bad", "good"), "0", 0),
        (("bad", "good"), "1", 1),
        (("bad", "good"), "2", None),
        (("bad", "good"), "01", None),
        (("bad", "good"), "-0", None),
        (("bad", "good"), "1.0", None),
        (("bad", "good"), "１", None),  # noqa: RUF001 (a full-width digit is meant)
        (("bad", "good"), "9" * 5000, None),
        (("bad", "good"), "Good", None),
        (("bad", "good"), "good ", None),
        (("bad", "Very Good"), "Very Good", 1),
        (("bad", "Very Good"), "very good", None),
        (("1", "0"), "0", 1),
        (("1", "2", "3"), "0", None),
        (("1", "2", "3"), "2", 1),
        (("1", "many"), "0", None),
        (("0.5", "many"), "0", None),
        (("-1", "+1"), "0", None),
    ],
)
def test_a_label_is_a_name_or_an_index_where_no_name_is_a_number(names: tuple[str, ...], label: str, index: int | None):
    task = Classification(labels=names)
    if index is None:
        with pytest.raises(KeyError):
            task.class_of(label)
    else:
        assert task.class_of(label) == index


@given(st.sets(st.text().filter(str.strip), min_size=2, max_size=10))
def test_an_exact_name_always_wins(names: set[str]):
    task = Classification(labels=tuple(names))
    assert [task.class_of(name) for name in task.classes] == list(range(len(names)))


@pytest.mark.parametrize(
    ("labels", "read"),
    [
        ([1, 2, 3], ("1", "2", "3")),
        ([0.5, 1.0], ("0.5", "1.0")),
        ([True, False], ("true", "false")),
        (["no", "yes"], ("no", "yes")),
    ],
)
def test_labels_of_a_recipe_are_read_as_text(labels: list[object], read: tuple[str, ...]):
    assert Classification.model_validate({"labels": labels}, strict=False).labels == read


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("one",), "must name at least two classes"),
        ((), "must name at least two classes"),
        (("a", "b", "a"), "must not name a class twice"),
        ((1, "1"), "must not name a class twice"),
        (("a", " "), "must not hold an empty name"),
        (("a", None), "valid string"),
    ],
)
def test_labels_that_make_no_task_are_refused(labels: tuple[object, ...], message: str):
    with pytest.raises(ValidationError, match=message):
        Classification.model_validate({"labels": labels})


@pytest.mark.parametrize(
    ("label", "read"), [("good", "good"), (" good ", "good"), (1, "1"), (1.0, "1.0"), (True, "true"), (False, "false")]
)
def test_a_row_is_read_with_its_label_as_text(label: object, read: str):
    assert TASK.read({"text": " fine ", "label": label}, "a:1") == Text("a:1", " fine ", read)


def test_a_row_without_a_label_column_is_read():
    assert TASK.read({"text": "fine"}, "a:1") == Text("a:1", "fine", None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "", "label": "good"}, "a:1: the text is empty"),
        ({"text": "\u3000\n", "label": "good"}, "a:1: the text is empty"),
        ({"text": b"fine", "label": "good"}, "a:1: the text is b'fine', which is not text"),
        ({"text": ["x" * 10_000], "label": "good"}, r"a:1: the text is \['x{58}\.\.\., which is not text"),
        ({"text": "fine", "label": ""}, "a:1: the label is empty"),
        ({"text": "fine", "label": float("nan")}, "a:1: the label is empty"),
        ({"text": "fine", "label": {}}, r"a:1: the label is \{\}, which is neither a word nor a number"),
    ],
)
def test_a_row_that_is_no_example_is_refused(row: dict[str, object], message: str):
    with pytest.raises(DataError, match=message):
        TASK.read(row, "a:1")


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (("good", "bad"), ("bad", "good")),
        (("10", "9", "1"), ("1", "9", "10")),
        (("0.5", "-1", "3"), ("-1", "0.5", "3")),
        (("10", "9", "many"), ("10", "9", "many")),
        (("好", "坏"), ("坏", "好")),
    ],
)
def test_labels_are_found_by_value_or_by_alphabet(labels: tuple[str, ...], found: tuple[str, ...]):
    assert Classification().resolve(seen(*labels)).classes == found


def test_labels_given_keep_their_order():
    assert Classification(labels=("good", "bad")).resolve(seen("bad", "good")).classes == ("good", "bad")


@pytest.mark.parametrize(
    ("task", "labels", "message", "hint"),
    [
        (TASK, ("good",), r"every row has the label 'good' \(first rows\.csv:2\)", "another class"),
        (Classification(), ("good",), r"every row has the label 'good' \(first rows\.csv:2\)", "another class"),
        (TASK, ("0", "bad"), r"every row has the label '0'", "another class"),
        (TASK, ("good", "bda"), r"^rows\.csv:3: unknown label 'bda' \(did you mean 'bad'\?\), 2 rows$", "'bad'"),
        (TASK, ("bad", "3"), r"^rows\.csv:3: unknown label '3', 2 rows$", "the numbers 0 to 1 may stand"),
        (Classification(labels=("1", "2")), ("1", "0"), r"^rows\.csv:3: unknown label '0'", "task.labels=null"),
        (Classification(labels=("a", "b", "c")), ("a", "b"), "task.labels names 'c', which no training", "'a', 'b'"),
        (Classification(), ("Good", "good"), r"csv:3: the label 'good' differs from 'Good' \(rows\.csv:2\)", "alike"),
        (Classification(), ("2", "2.0"), r"rows\.csv:3: the label '2\.0' differs from '2'", "list both in task.labels"),
    ],
)  # fmt: skip
def test_labels_that_are_not_the_tasks_are_told(task: Classification, labels: tuple[str, ...], message: str, hint: str):
    with pytest.raises(DataError, match=message) as error:
        task.resolve(seen(*labels))
    assert hint in error.value.hint


def test_numbers_are_explained_only_where_they_can_be_indices():
    with pytest.raises(DataError) as error:
        Classification(labels=("1", "2")).check(seen("0"))
    assert "may stand" not in error.value.hint


@pytest.mark.parametrize("task", [TASK, Classification()])
def test_a_thousand_labels_are_too_many(task: Classification):
    with pytest.raises(DataError, match="more than 1,000 different labels, such as 'page 0'") as error:
        task.resolve(seen(*(f"page {number}" for number in range(MOST_LABELS + 1))))
    assert "data.columns.label=NAME" in error.value.hint


def test_long_labels_and_lists_of_labels_are_cut_in_messages():
    task = Classification(labels=tuple(f"class {number}" for number in range(500)))
    with pytest.raises(DataError) as error:
        task.check(seen(*("word " * 1000 + str(number) for number in range(50))))
    assert error.value.message.count("unknown label") == 10
    assert error.value.message.endswith("\n  and 40 more")
    assert len(error.value.message) < 1200
    assert "'class 9' and 490 more" in error.value.hint


def test_a_models_config_is_told_the_classes():
    assert TASK.model_config_fields() == {
        "num_labels": 2,
        "id2label": {0: "bad", 1: "good"},
        "label2id": {"bad": 0, "good": 1},
        "problem_type": "single_label_classification",
    }


def test_texts_are_cut_at_the_longest_length_and_unlabelled_ones_have_an_item_to_predict():
    tokenizer = tiny.tokenizer()
    task = Classification(labels=("bad", "good"), max_length=5)
    examples = [Text("", "a good film", "good"), Text("", "the plot was not very good", "0"), Text("", "fine")]
    encoded = task.encode(tokenizer, examples)
    assert [one.targets for [one] in encoded] == [[1], [0], [0]]
    assert [tokenizer.decode(one.ids) for [one] in encoded] == [
        "[CLS] a good film [SEP]",
        "[CLS] the plot was [SEP]",
        "[CLS] fine [SEP]",
    ]


def test_a_text_without_tokens_still_has_one():
    [[encoded]] = TASK.encode(tiny.tokenizer(decoder=True), [Text("", "\u200b", "good")])
    assert len(encoded.ids) == 1


def test_the_loss_is_a_sum_over_labelled_texts_in_single_precision():
    logits = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.tensor([[1], [IGNORED], [0], [1]])
    batch = Batch(ids=torch.zeros(4, 3), mask=torch.ones(4, 3), targets=targets, rows=torch.arange(4))
    model = lambda **_: SimpleNamespace(logits=logits)  # noqa: E731
    expected = -sum(log_softmax(logits[row].float(), 0)[label] for row, label in ((0, 1), (2, 0), (3, 1)))
    loss = TASK.loss(model, batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", ["none", {"bad": 3.0, "good": 0.5}, {"good": 2.0}])
def test_the_mean_loss_is_torchs_with_its_weights_and_smoothing(weights: object, smoothing: float):
    task = TASK.model_copy(update={"class_weights": weights, "label_smoothing": smoothing})
    logits = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([[1], [0], [IGNORED], [0], [1], [0]])
    batch = Batch(ids=torch.zeros(6, 3), mask=torch.ones(6, 3), targets=targets, rows=torch.arange(6))
    given = None if weights == "none" else torch.tensor([weights.get(label, 1.0) for label in TASK.classes])  # type: ignore[attr-defined]
    expected = cross_entropy(logits, targets[:, 0], weight=given, label_smoothing=smoothing)
    loss = task.loss(lambda **_: SimpleNamespace(logits=logits), batch)  # type: ignore[arg-type, misc]
    torch.testing.assert_close(loss / task.counted(targets.numpy().reshape(-1)), expected)


def test_every_cut_gives_the_same_gradient_with_weights_and_smoothing(
    bases: Callable[..., Path], reviews: Path, tmp_path: Path
):
    changes = ("task.class_weights={bad: 5.0}", "task.label_smoothing=0.1", "train.batch_size=32")
    prepared = prepare(recipe(bases(), reviews, *changes), tmp_path)
    randomize(prepared)
    whole, parts = gradients(prepared, 10_000), gradients(prepared, 30)
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, parts[name], rtol=1e-4, atol=1e-6, msg=name)


def test_balanced_weights_make_the_classes_count_alike_and_are_written_out(tmp_path: Path):
    rows = [f"film {number},{'good' if number % 4 else 'bad'}\n" for number in range(80)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(rows))
    found = data.load(recipe(Path("no-base"), tmp_path / "rows.csv", "task.class_weights=balanced"), tmp_path)
    assert isinstance(found.task, Classification)
    assert found.task.class_weights == pytest.approx({"bad": 64 / (2 * 16), "good": 64 / (2 * 48)})
    targets = np.array([found.task.class_of(label) for [label] in found.train.labels])
    assert found.task.counted(targets) == pytest.approx(64)
    assert found.task.counted(targets[targets == 0]) == pytest.approx(32)
    again = parse(yaml12.loads(recipe(Path("b"), tmp_path).model_copy(update={"task": found.task}).to_yaml(), where=""))
    assert again.task == found.task


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.class_weights={god: 2.0}", "task.class_weights: holds 'god', which is no label (did you mean 'good'?)"),
        ("task.class_weights={good: 0}", "task.class_weights.good: must be greater than 0"),
        ("task.class_weights={good: heavy}", "task.class_weights.good: must be a number, found 'heavy'"),
        (
            "task.class_weights=balance",
            "must be 'none' or 'balanced' or a mapping, found 'balance'",
        ),
        ("task.label_smoothing=1", "task.label_smoothing: must be less than 1"),
    ],
)
def test_weights_and_smoothing_that_are_none_are_told(override: str, message: str):
    with pytest.raises(RecipeError) as error:
        recipe(Path("no-base"), Path("rows.csv"), override)
    assert message in error.value.message


def test_weights_of_labels_that_the_rows_do_not_have_are_told():
    with pytest.raises(DataError, match=r"task.class_weights holds 'god', which is no label \(did you mean 'good'\?\)"):
        Classification(class_weights={"god": 2.0}).resolve(seen("bad", "good"))


def test_a_prediction_is_the_likeliest_label_with_all_probabilities():
    found = TASK.prediction(Text("a:1", "fine"), np.array([[1.0, 1.0 + np.log(3)]], dtype=np.float32))
    assert found == {"text": "fine", "label": "good", "scores": pytest.approx({"bad": 0.25, "good": 0.75})}


def test_a_prediction_of_large_outputs_is_finite():
    found = TASK.prediction(Text("", "fine"), np.array([[-1e4, 1e4]], dtype=np.float32))
    assert found["scores"] == {"bad": 0.0, "good": 1.0}


def test_the_majority_baseline_gives_every_text_the_shares_of_the_classes():
    test = [Text("", "anything", "bad"), Text("", "else", "good")]
    outputs = TASK.baselines(TRAIN, test, seed=1)["majority"].values
    assert np.exp(outputs) == pytest.approx(np.array([[2 / 6, 4 / 6]] * 2))


def test_the_tfidf_baseline_tells_apart_what_words_signs_and_characters_tell_apart():
    train = [
        Text("", text, label)
        for text, label in [
            ("dull", "bad"),
            ("great", "good"),
            (":(", "bad"),
            (":)", "good"),
            ("难", "bad"),
            ("好", "good"),
        ]
    ]
    test = [Text("", f"{one.text} {one.text}", one.label) for one in train]
    outputs = TASK.baselines(train, test, seed=1)["tfidf"].values
    assert [TASK.classes[index] for index in outputs.argmax(1)] == [one.label for one in train]
    assert np.exp(outputs).sum(1) == pytest.approx(1)


def test_baselines_have_finite_outputs_for_a_class_that_no_training_row_has():
    task = Classification(labels=("awful", "bad", "good"))
    found = task.baselines(TRAIN, TRAIN, seed=1)
    assert list(found) == ["majority", "tfidf"]
    for outputs in (outputs.values for outputs in found.values()):
        assert outputs.shape == (4, 3)
        assert np.isfinite(outputs).all()
        assert (outputs.argmin(1) == 0).all()
