"""Entities: rows and types, word pieces and windows, scores held to seqeval's, predictions and baselines."""

import itertools
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from seqeval import metrics as seqeval
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import log_softmax
from transformers import PreTrainedTokenizerFast

from lowres_ft.errors import DataError, ModelError
from lowres_ft.tasks import _tags
from lowres_ft.tasks._sentence import Sentence
from lowres_ft.tasks._windows import Cutter, StandIns, align, windows
from lowres_ft.tasks.base import IGNORED, Batch, Ragged, Seen
from lowres_ft.tasks.ner import Ner
from tests import tiny

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


# Word pieces and windows

CORPUS = [
    "the film was great and the plot was dull",
    "New York, a long cold day ... in the U.S.A.!",
    "naïve 東京 film",
] * 5


def _wrapped(backend: Tokenizer, before: str = "<s>", after: str = "</s>", **special: str) -> PreTrainedTokenizerFast:
    pairs = [(token, backend.token_to_id(token)) for token in (before, after)]
    single = f"{before} $A {after}"
    template = processors.TemplateProcessing(single=single, special_tokens=pairs)
    backend.post_processor = template
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", **special)


def wordpiece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["<pad>", "[UNK]", "<s>", "</s>"]
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special))
    return _wrapped(backend, unk_token="[UNK]")


def byte_level(*, trim: bool = True) -> PreTrainedTokenizerFast:
    """Pieces with the space before their word, of bytes where need be; without special tokens around a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")


def unigram() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>")
    backend.train_from_iterator(CORPUS, trainer)
    return _wrapped(backend, unk_token="<unk>")


TOKENIZERS = {
    "one a word": tiny.tokenizer(),
    "decoder": tiny.tokenizer(decoder=True),
    "wordpiece": wordpiece(),
    "byte-level": byte_level(),
    "byte-level, untrimmed": byte_level(trim=False),
    "unigram": unigram(),
}
for _found in TOKENIZERS.values():
    _found.pad_token = _found.pad_token or _found.eos_token
WORDS = st.lists(
    st.one_of(
        st.sampled_from(["film", "greatest", "...", "U.S.A.", "naïve", "東京", "\u200b", "\x7f", "👩‍💻", "a b"]),
        st.text(min_size=1, max_size=8).filter(lambda word: word.strip() and not word.startswith("<")),
    ),
    min_size=1,
    max_size=40,
)
PROPERTY = settings(max_examples=150, deadline=None)


@PROPERTY
@given(st.sampled_from(sorted(TOKENIZERS)), WORDS, st.integers(8, 40), st.integers(0, 50), st.integers(0, 2**31))
def test_every_word_is_an_item_once_and_in_order(name: str, words: list[str], length: int, overlap: int, seed: int):
    tokenizer = TOKENIZERS[name]
    tags = [TASK.names[index] for index in np.random.default_rng(seed).integers(0, 5, len(words))]
    example = TASK.read({"words": words, "tags": tags}, "a:1")
    task = TASK.model_copy(update={"max_length": length, "overlap": overlap})
    [sequences] = task.encode(tokenizer, [example])
    items = [target for one in sequences for target in one.targets if target != IGNORED]
    assert [TASK.names[item] for item in items] == _tags.to_bio(tags)
    around = tokenizer("a", return_special_tokens_mask=True)
    special = [i for i, mask in zip(around["input_ids"], around["special_tokens_mask"], strict=True) if mask]
    for one in sequences:
        assert len(one.ids) == len(one.targets) <= length
        assert any(target != IGNORED for target in one.targets)
        if special:
            assert [one.ids[0], one.ids[-1]] == special
            assert [one.targets[0], one.targets[-1]] == [IGNORED, IGNORED]


@PROPERTY
@given(st.sampled_from(sorted(TOKENIZERS)), st.text(min_size=1, max_size=60).filter(str.strip))
def test_every_word_of_a_text_is_an_item(name: str, text: str):
    example = TASK.bare(text, "")
    [sequences] = TASK.encode(TOKENIZERS[name], [example])
    items = [target for one in sequences for target in one.targets if target != IGNORED]
    assert items == [0] * len(example.words)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_the_pieces_are_those_that_any_client_gets(name: str):
    text = "the greatest film was New York, and dull."
    [[encoded]] = TASK.encode(TOKENIZERS[name], [TASK.bare(text, "")])
    assert encoded.ids == TOKENIZERS[name](text)["input_ids"]


@pytest.mark.parametrize("name", ["wordpiece", "byte-level", "byte-level, untrimmed", "unigram"])
def test_a_words_item_is_its_first_piece(name: str):
    tokenizer = TOKENIZERS[name]
    example = sentence("the filmgreat naïve York")
    [[encoded]] = TASK.encode(tokenizer, [example])
    places = [place for place, target in enumerate(encoded.targets) if target != IGNORED]
    firsts = [tokenizer.decode(encoded.ids[place]).strip().lstrip("▁#") for place in places]
    for first, word in zip(firsts, example.strings, strict=True):
        assert first
        assert word.startswith(first)


def test_a_piece_of_several_words_is_repeated_and_a_word_without_one_gets_the_unknown():
    pieces = align([5, 6, 7], [(0, 1), (1, 4), (4, 6)], [[0, 2], [2, 3], [3, 4], [5, 6], [7, 8]], StandIns(1, None))
    assert pieces.ids == [5, 6, 6, 7, 1]
    assert pieces.firsts == [0, 1, 2, 3, 4]


def test_all_pieces_of_a_text_are_kept():
    pieces = align(
        [5, 6, 7, 8, 9], [(0, 0), (0, 2), (2, 3), (4, 5), (6, 7)], [[0, 1], [1, 3], [4, 5]], StandIns(1, None)
    )
    assert pieces.ids == [5, 6, 6, 7, 8, 9]
    assert pieces.firsts == [1, 2, 4]


@given(st.integers(0, 300), st.integers(1, 60), st.integers(0, 80))
def test_windows_are_as_few_as_can_be_and_each_piece_is_where_it_has_most_context(length: int, room: int, overlap: int):
    found = list(windows(length, room, overlap))
    shared = min(overlap, room // 2)
    assert len(found) == max(1, -(-(length - shared) // (room - shared)))
    assert [part for *_, first, last in found for part in range(first, last)] == list(range(length))
    for start, end, first, last in found:
        assert 0 <= start <= first <= last <= end <= length
        assert end - start <= room
    for piece in range(length):
        context = [min(piece - start, end - 1 - piece) for start, end, *_ in found if start <= piece < end]
        (own,) = [min(piece - s, e - 1 - piece) for s, e, first, last in found if first <= piece < last]
        if len(found) > 1 and shared and found[0][1] <= piece < found[-1][0]:  # away from the text's own ends
            assert own >= max(context) - 1
    for (_, end, *_), (start, *_) in itertools.pairwise(found):
        assert end - start >= shared


def test_a_word_of_more_pieces_than_a_window_has_its_item_in_one():
    tokenizer = TOKENIZERS["byte-level"]
    task = Ner(labels=("LOC", "PER"), max_length=8, overlap=2)
    words = ["a", "x" * 100, "b"]
    [sequences] = task.encode(tokenizer, [task.read({"words": words, "tags": ["O", "B-LOC", "B-PER"]}, "")])
    assert [t for one in sequences for t in one.targets if t != IGNORED] == [0, 1, 3]
    assert len(sequences) < 4  # windows in which no word begins are left out


def test_tokenizers_that_cannot_do_it_are_refused():
    with pytest.raises(ModelError, match="does not tell where in a text its pieces stand"):
        Cutter.of(SimpleNamespace(is_fast=False), 8, 0)
    with pytest.raises(ModelError, match="max_length is 2, which 3 special tokens fill"):
        Cutter.of(tiny.tokenizer(), 2, 0)


def test_unlabelled_words_are_items_to_predict():
    [[encoded]] = TASK.encode(tiny.tokenizer(), [sentence("the good film")])
    assert encoded.targets == [IGNORED, 0, 0, 0, IGNORED]


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
