"""Tags in four schemes, read by one rule, which is seqeval's; and the words and spans of a text."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities

from lowres_ft.errors import DataError
from lowres_ft.tasks import _tags, _words
from lowres_ft.tasks._words import Span

TYPES = ("LOC", "PER-name")
TAGS = st.lists(
    st.one_of(st.just("O"), st.tuples(st.sampled_from("BIES"), st.sampled_from(TYPES)).map("-".join)), max_size=12
)
ENTITIES = st.lists(st.tuples(st.sampled_from(("O", *TYPES)), st.integers(1, 4)), max_size=6)


def written(parts: list[tuple[str, int]], scheme: str) -> list[str]:
    """Tags of a row of entities, and of words outside, in a scheme."""
    tags: list[str] = []
    before = "O"
    for kind, length in parts:
        inner = [f"I-{kind}"] * (length - 1)
        if kind == "O":
            tags += ["O"] * length
        elif scheme == "IOB1":
            tags += [f"{'B' if before == kind else 'I'}-{kind}", *inner]
        elif scheme == "BIO":
            tags += [f"B-{kind}", *inner]
        else:
            last, single = ("E", "S") if scheme == "BIOES" else ("L", "U")
            tags += [f"B-{kind}", *inner[1:], f"{last}-{kind}"] if length > 1 else [f"{single}-{kind}"]
        before = kind
    return tags


@given(ENTITIES, st.sampled_from(("IOB1", "BIOES", "BILOU")))
def test_every_scheme_means_the_same_entities(parts: list[tuple[str, int]], scheme: str):
    assert _tags.to_bio(written(parts, scheme)) == written(parts, "BIO")


@given(ENTITIES)
def test_iob1_is_known_by_its_beginnings(parts: list[tuple[str, int]]):
    kinds = {kind for kind, _ in parts} - {"O"}
    tags = written(parts, "IOB1")
    assert _tags.may_be_iob1(tags)
    assert bool(list(_tags.begun_inside(tags))) == bool(kinds)
    for scheme in ("BIO", "BIOES", "BILOU"):
        assert list(_tags.begun_inside(written(parts, scheme))) == []
        assert _tags.may_be_iob1(written(parts, scheme)) == (not kinds)


@given(TAGS)
def test_entities_are_seqevals(tags: list[str]):
    bio = _tags.to_bio(tags)
    index = {tag: number for number, tag in enumerate(_tags.of_types(TYPES))}
    found = _tags.entities(np.array([index[tag] for tag in bio], dtype=np.int64), np.zeros(len(tags)))
    expected = [(TYPES.index(kind), first, last + 1) for kind, first, last in get_entities(tags)]
    assert [(kind, first, end) for first, end, kind in found.tolist()] == expected
    assert _tags.to_bio(bio) == bio
    assert [(kind, first, last) for kind, first, last in get_entities(bio)] == get_entities(tags)


def test_entities_end_with_their_row():
    found = _tags.entities(np.array([1, 2, 2, 4, 4, 2]), np.array([0, 0, 1, 1, 2, 2]))
    assert found.tolist() == [[0, 2, 0], [2, 3, 0], [3, 4, 1], [4, 5, 1], [5, 6, 0]]


def test_mended_tags_are_known_by_their_places():
    tags = ["I-LOC", "I-LOC", "O", "B-LOC", "I-PER", "E-PER", "I-PER", "O", "L-LOC"]
    assert _tags.to_bio(tags) == ["B-LOC", "I-LOC", "O", "B-LOC", "B-PER", "I-PER", "B-PER", "O", "B-LOC"]
    assert list(_tags.begun_inside(tags)) == [0, 4, 6, 8]
    assert not _tags.may_be_iob1(tags)


@pytest.mark.parametrize("tag", ["", "B", "B-", "B- ", "X-LOC", "LOC", "b-LOC", "o", "BLOC", "B_LOC", 0, None, True])
def test_what_is_no_tag(tag: object):
    assert not _tags.is_tag(tag)


@pytest.mark.parametrize("tag", ["O", "B-LOC", "S-geo-loc", "I--", "U-好", "L-a b", "E-O"])
def test_what_is_a_tag(tag: str):
    assert _tags.is_tag(tag)


# Words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't!", ["Don", "'", "t", "!"]),
        ("Ask @paul_w about #music... or a@b.de", "Ask @paul_w about #music ... or a @b . de".split()),
        ("see http://t.co/a?b=1, (www.x.org).", "see http://t.co/a?b=1 , ( www.x.org ) .".split()),
        ("東京タワーは高い", list("東京タワーは高い")),
        ("in 東京 2020年", ["in", "東", "京", "2020", "年"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("กรุงเทพ", ["ก", "รุ", "ง", "เ", "ท", "พ"]),
        ("Zu\u0308rich na\u0131\u0308ve", ["Zu\u0308rich", "na\u0131\u0308ve"]),
        ("न\u200dम क", ["न\u200dम", "क"]),
        ("\u200b", ["\u200b"]),
        ("#! ## @", ["#", "!", "##", "@"]),
    ],
)
def test_a_text_is_split_into_words(text: str, words: list[str]):
    assert [text[start:end] for start, end in _words.split(text)] == words


@given(st.text(), st.lists(st.integers(0, 30)))
def test_words_are_all_of_a_text_but_its_white_space(text: str, borders: list[int]):
    found = _words.split(text, borders)
    assert all(start < end for start, end in found)
    assert all(not any(map(str.isspace, text[start:end])) for start, end in found)
    inside = {place for start, end in found for place in range(start, end)}
    assert sum(end - start for start, end in found) == len(inside)
    assert [place for place, sign in enumerate(text) if place not in inside and not sign.isspace()] == []
    assert not any(start < border < end for start, end in found for border in borders)


def test_long_runs_are_split_in_a_moment():
    assert len(_words.split("a" * 100_000 + "你" * 100_000 + "." * 100_000)) == 100_002
    assert len(_words.split("http://" + "." * 100_000)) < 10


# Spans


@given(st.text(alphabet="ab, 你", max_size=20), st.data())
def test_no_entity_is_lost_or_moved(text: str, data: st.DataObject):
    places = st.integers(0, len(text))
    cuts = sorted(data.draw(st.sets(places, max_size=6)))
    given_spans = [
        [start, end, data.draw(st.sampled_from(TYPES))]
        for start, end in zip(cuts[::2], cuts[1::2], strict=False)
        if text[start:end].strip()
    ]
    spans = _words.spans(given_spans, text, "a:1")
    assert [(text[s.start : s.end], s.label) for s in spans] == [
        (text[a:b].strip(), kind) for a, b, kind in given_spans
    ]
    assert [s.trimmed for s in spans] == [text[a:b].strip() != text[a:b] for a, b, _ in given_spans]
    words = _words.split(text, {border for span in spans for border in (span.start, span.end)})
    tags = _words.tagged(words, spans)
    found = [Span(words[first][0], words[last][1], kind) for kind, first, last in get_entities(tags)]
    assert [(s.start, s.end, s.label) for s in found] == [(s.start, s.end, s.label) for s in spans]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "the entities are null, not a list"),
        ("[]", "the entities are '\\[\\]', not a list"),
        ([5], "entity 1: 5 is no entity"),
        ([[0, 3]], r"entity 1: \[0, 3\] is no entity"),
        ([{"start": 0, "stop": 3}], "entity 1: .* has no end and no label"),
        ([[0, 3, "LOC"], ["4", 6, "LOC"]], "entity 2: start is '4', which is not a whole number"),
        ([[0, 3.0, "LOC"]], "entity 1: end is 3.0, which is not a whole number"),
        ([[False, 3, "LOC"]], "entity 1: start is false, which is not a whole number"),
        ([[0, 3, ""]], "entity 1: the label is '', which names no type"),
        ([[0, 3, 7]], "entity 1: the label is 7, which names no type"),
        ([[3, 3, "LOC"]], "entity 1: it starts at 3 and ends at 3"),
        ([[3, 1, "LOC"]], "entity 1: it starts at 3 and ends at 1"),
        ([[-1, 3, "LOC"]], "entity 1: -1-3 leaves the text, which has 11 characters"),
        ([[0, 12, "LOC"]], "entity 1: 0-12 leaves the text, which has 11 characters"),
        ([[3, 4, "LOC"]], "entity 1: 3-4 holds white space alone"),
        ([[4, 8, "PER"], [0, 5, "LOC"]], "the entities LOC 0-5 and PER 4-8 overlap"),
        ([[0, 3, "LOC"], [0, 3, "LOC"]], "the entities LOC 0-3 and LOC 0-3 overlap"),
    ],
)
def test_what_is_no_entity_is_told(values: object, message: str):
    with pytest.raises(DataError, match=f"^a:1: {message}"):
        _words.spans(values, "New York is", "a:1")


def test_entities_may_touch_and_stand_in_any_order():
    spans = _words.spans([[3, 8, "LOC"], {"start": 0, "end": 3, "label": "PER", "id": 7}], "New York", "")
    assert spans == [Span(0, 3, "PER"), Span(4, 8, "LOC", trimmed=True)]


def test_kinds_of_errors():
    # types: 0 is LOC (classes 1, 2), 1 is PER (3, 4); rows of four words
    truth = np.array([1, 2, 0, 3, 3, 4, 0, 1, 1, 2, 0, 3, 0, 0, 1, 2])
    found = np.array([1, 0, 0, 1, 3, 4, 0, 0, 3, 4, 4, 3, 0, 3, 0, 0])
    rows = np.repeat(np.arange(4), 4)
    assert _tags.errors(truth, found, rows) == {"borders": 1, "type": 1, "both": 1, "invented": 1, "missed": 2}
    assert sum(_tags.errors(truth, truth, rows).values()) == 0
