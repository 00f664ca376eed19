"""Word pieces and windows: every word of a text is an item once, whatever the tokenizer and the length."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lowres_ft.errors import ModelError
from lowres_ft.tasks import _tags
from lowres_ft.tasks._windows import Cutter, StandIns, align, windows
from lowres_ft.tasks.base import IGNORED
from lowres_ft.tasks.ner import Ner
from tests import tiny
from tests.test_ner import TASK, sentence

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
