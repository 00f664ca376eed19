"""Cleaners: what each does, that it does so twice alike, and that training and use see the same text."""

import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stopwordsiso import langs

from lowres_ft import data, device
from lowres_ft.clean import cleaned, cleaner, known
from lowres_ft.errors import DataError, RecipeError
from lowres_ft.generation import Session, Writer
from lowres_ft.pipeline import run
from lowres_ft.prediction import Predictor, evaluate_bundle, examples
from lowres_ft.recipe import load_recipe, parse
from lowres_ft.tasks.chat import Chat, Conversation
from lowres_ft.tasks.classification import Classification, Text
from tests import tiny_chat
from tests.conftest import recipe

Bases = Callable[..., Path]
CPU = device.find("cpu")
ALL = ("mask_urls", "strip_html", "unicode", "lowercase", "stopwords:en", "whitespace")
TEXTS = st.text(st.characters(codec="utf-8") | st.sampled_from("<>&;/!-[] .@'\n\u0301\u2019"), max_size=40)
WEB = st.text(st.sampled_from("ahtp:/.@w-_x, é"), max_size=30)


def clean(name: str, text: str) -> str:
    return cleaner((name,))(text)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("unicode", "cafe\u0301 \u212b", "caf\u00e9 \u00c5"),
        ("whitespace", " a\t\tb\n\u00a0\u3000c ", "a b c"),
        ("lowercase", "STRASSE Ünder ΑΣ", "strasse ünder ας"),
        ("strip_html", "one<br /><br />two", "one  two"),
        ("strip_html", "<p>one</p><ul><li>two</li></ul>", " one   two  "),
        ("strip_html", "<b>bo</b>ld <a href='x>y'>link</a>", "bold link"),
        ("strip_html", "Q&amp;A &eacute;&#233;&#xe9;&nbsp;&lt;b&gt;", "Q&A ééé\u00a0<b>"),
        ("strip_html", "a<script>if (x<y) {}</script>b<style>p {}</style>c<!-- d -->", "a b c"),
        ("strip_html", "x < y, 5 <6, i <3 you & me", "x < y, 5 <6, i <3 you & me"),
        ("strip_html", "<!DOCTYPE html><html><body>text</body></html>", "  text  "),
        ("strip_html", "<![if x]>text<![endif]>", "text"),
        ("mask_urls", "see http://a.b/c?d=e#f. Or (https://x.y), www.z.com!", "see URL. Or (URL), URL!"),
        ("mask_urls", "看http://a.cn/b这里 HTTPS://X.Y", "看URL这里 URL"),
        ("mask_urls", "write to jo.do+x@mail.co.uk, or @jo", "write to EMAIL, or @jo"),
        ("mask_urls", "http:// at 5:30, a@b", "http:// at 5:30, a@b"),
        ("stopwords:en", "The film is not dull, it\u2019s slow", "film dull, slow"),
        ("stopwords:en", "Is it the?", "?"),
        ("stopwords:de", "Der Film ist, wie das Buch,\nöde", "Film, Buch,\nöde"),
        ("stopwords:hi", "यह फिल्म और किताब", "फिल्म किताब"),
        ("stopwords:en", "the of and", ""),
    ],
)
def test_what_a_cleaner_does(name: str, text: str, expected: str):
    assert clean(name, text) == expected


@pytest.mark.parametrize("name", ["unicode", "whitespace", "lowercase", "mask_urls", "stopwords:en", "stopwords:fr"])
@given(text=TEXTS | WEB)
def test_what_is_clean_stays_as_it_is(name: str, text: str):
    once = clean(name, text)
    assert clean(name, once) == once


@given(text=TEXTS)
def test_html_of_any_kind_is_read_and_text_without_it_stays(text: str):
    assert isinstance(clean("strip_html", text), str)
    plain = re.sub("[<&]", "", text)
    assert clean("strip_html", plain) == plain


@given(text=TEXTS)
def test_cleaners_do_what_they_say_of_any_text(text: str):
    assert unicodedata.is_normalized("NFC", clean("unicode", text))
    assert clean("whitespace", text).split(" ") == (text.split() or [""])
    assert len(clean("stopwords:en", text)) <= len(text)
    assert set(clean("stopwords:en", text)) <= set(text)


@given(text=TEXTS)
def test_cleaners_are_applied_in_their_order(text: str):
    expected = text
    for name in ALL:
        expected = clean(name, expected)
    assert cleaner(ALL)(text) == expected


def test_the_order_matters():
    text = "&lt;b&gt; HTTP://X.Y"
    assert cleaner(("strip_html", "mask_urls", "lowercase"))(text) == "<b> url"
    assert cleaner(("lowercase", "mask_urls", "strip_html"))(text) == "<b> URL"


def test_stop_words_of_every_language_with_spaces_are_known():
    unspaced = {"ja", "th", "zh"}
    assert len(langs()) > 50
    for language in langs() - unspaced:
        assert known(f"stopwords:{language}")
        assert clean(f"stopwords:{language}", "lowres") == "lowres"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("strip_htm", "is 'strip_htm', which is no cleaner (did you mean 'strip_html'?)"),
        ("Lowercase", "is 'Lowercase', which is no cleaner (did you mean 'lowercase'?)"),
        ("xyz", "which is no cleaner; there are unicode, whitespace, strip_html, lowercase, mask_urls, stopwords:LANG"),
        ("stopwords:english", "no stop words are known of the language 'english'"),
        ("stopwords:EN", "no stop words are known of the language 'EN' (did you mean 'en'?)"),
        ("stopwords", "names no language; write stopwords:en, or another of af, ar,"),
        ("stopwords:", "names no language; write stopwords:en"),
        ("stopwords:zh", "puts no spaces between words, so its stop words cannot be told"),
    ],
)
def test_an_unknown_cleaner_is_told_with_the_recipe(name: str, message: str):
    with pytest.raises(RecipeError) as error:
        load_recipe("sentiment-lora", [f"data.clean=[unicode, '{name}']"])
    assert "data.clean.1: " in error.value.message
    assert message in error.value.message


def test_a_recipe_with_cleaners_comes_back_equal():
    found = load_recipe("sentiment-lora", ["data.clean=[strip_html, 'stopwords:de']"])
    assert found.data.clean == ("strip_html", "stopwords:de")
    assert load_recipe("sentiment-lora").data.clean == ()
    assert parse(found.model_dump(mode="json", exclude_none=True)) == found


@pytest.mark.parametrize("names", ["[lowercase]", "[unicode, whitespace]", "['stopwords:en']"])
def test_entities_refuse_cleaners_by_name(names: str):
    with pytest.raises(RecipeError) as error:
        load_recipe("entities-lora", [f"data.clean={names}"])
    for name in re.findall(r"[\w:]+", names):
        assert name in error.value.message
    assert "data.clean: names" in error.value.message
    assert "may move characters, but ner answers with places in the text as given" in error.value.message


def test_both_texts_of_a_pair_and_every_message_are_cleaned():
    pair = Text("a:1", " A  film", "good", "THE\nPLOT")
    task = Classification(labels=("bad", "good"), pairs=True)
    assert cleaned(task, pair, ("whitespace", "lowercase")) == Text("a:1", "a film", "good", "the plot")
    assert cleaned(task, pair, ()) is pair
    talk = [{"role": "system", "content": "Be  KIND"}, {"role": "user", "content": "<b>Hi</b>"}]
    found = cleaned(Chat(), Conversation("a:1", talk), ("strip_html", "whitespace"))
    assert [message["content"] for message in found.messages] == ["Be KIND", "Hi"]
    with pytest.raises(DataError, match="a:1: message 1 is empty after cleaning"):
        cleaned(Chat(), Conversation("a:1", [{"role": "user", "content": "<br>"}]), ("strip_html",))


def test_rows_are_cleaned_before_they_are_compared_split_and_known_again(tmp_path: Path):
    labels = [("bad", "good")[number // 2 % 2] for number in range(80)]
    marked = [f"<p>Film   {number // 2}</p>{'<br>' * (number % 2)},{label}\n" for number, label in enumerate(labels)]
    (tmp_path / "dirty.csv").write_text("text,label\n" + "".join(marked))
    plain = [f"film {number // 2},{label}\n" for number, label in enumerate(labels)]
    (tmp_path / "plain.csv").write_text("text,label\n" + "".join(plain))
    cleaners = "data.clean=[strip_html, whitespace, lowercase]"
    dirty = data.load(recipe(Path("no-base"), tmp_path / "dirty.csv", cleaners), tmp_path)
    tidy = data.load(recipe(Path("no-base"), tmp_path / "plain.csv"), tmp_path)
    assert dirty.fingerprint() == tidy.fingerprint()
    texts = {name: {one.text for one in split.examples(dirty.task)} for name, split in dirty.splits().items()}
    assert not texts["train"] & texts["test"]


def test_a_row_that_is_empty_once_it_is_clean_is_told_with_file_and_line(tmp_path: Path):
    (tmp_path / "a.csv").write_text("text,label\nfine,good\n<br/>,bad\n<i> </i>,bad\n")
    with pytest.raises(DataError, match=r"a\.csv:3: the text is empty after cleaning \(data\.clean\)\n.*a\.csv:4"):
        data.load(recipe(Path("no-base"), tmp_path / "a.csv", "data.clean=[strip_html]"), tmp_path)


def test_a_bundle_cleans_what_it_is_given_and_tells_of_it_as_it_was(bases: Bases, reviews: Path, tmp_path: Path):
    names = "data.clean=[strip_html, mask_urls, lowercase, whitespace]"
    bundle = run(recipe(bases(), reviews, names), tmp_path / "bundle", device_name="cpu")
    assert bundle.recipe.data.clean == ("strip_html", "mask_urls", "lowercase", "whitespace")
    predictor = Predictor(*bundle.load(CPU))
    dirty = "<b>The FILM</b> was\tGood http://a.b"
    first, second = predictor.texts([dirty, "the film was good url"])
    assert first["text"] == dirty
    assert first["scores"] == pytest.approx(second["scores"], abs=1e-6)
    (tmp_path / "in.txt").write_text(f"{dirty}\n")
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": dirty}) + "\n")
    for name in ("in.txt", "in.jsonl"):
        [found] = predictor(examples(bundle, str(tmp_path / name)))
        assert found == first | {"scores": pytest.approx(first["scores"], abs=1e-6)}
    with pytest.raises(DataError, match="text 2: the text is empty after cleaning"):
        list(predictor.texts(["fine", "<br>"]))
    card = (bundle.folder / "README.md").read_text()
    assert "Texts are cleaned first (strip_html, mask_urls, lowercase, whitespace)" in card


def test_a_text_has_the_same_ids_in_training_and_in_prediction(bases: Bases, reviews: Path, tmp_path: Path):
    dirty = tmp_path / "dirty.csv"
    dirty.write_text(reviews.read_text().replace("the film", "<b>THE</b>&nbsp;Film"))
    names = "data.clean=[strip_html, unicode, lowercase, 'stopwords:en', whitespace]"
    bundle = run(recipe(bases(), dirty, names), tmp_path / "bundle", device_name="cpu")
    adapted, plan = bundle.load(CPU)
    (tmp_path / "work").mkdir()
    rows = data.load(bundle.recipe, tmp_path / "work")
    stored = list(rows.train.examples(rows.task))
    given = {f"{dirty}:{line}": text for line, text in enumerate(dirty.read_text().splitlines(), start=1)}
    for one in stored[:20]:
        bare = adapted.task.bare(given[one.where].rpartition(",")[0], "")
        [seen], [trained] = (
            adapted.task.encode(adapted.tokenizer, [text])[0]
            for text in (cleaned(adapted.task, bare, adapted.cleaners), one)
        )
        assert seen.ids == trained.ids
    scores = evaluate_bundle(bundle, adapted, plan, tmp_path / "work", str(dirty)).to_json()
    assert scores["accuracy"]["count"] == 60
    again = evaluate_bundle(bundle, adapted, plan, tmp_path / "work").to_json()
    assert again == bundle.passport.scores["test"]


def test_a_chat_bundle_cleans_what_it_is_asked(chat_bases: Bases, chats: Path, tmp_path: Path):
    wanted = tiny_chat.recipe(chat_bases("llama"), chats, "data.clean=[strip_html, whitespace]")
    bundle = run(wanted, tmp_path / "bundle", device_name="cpu")
    adapted, plan = bundle.load(CPU)
    dirty, plain = "<b>What</b>  is 3 and\n4?", "What is 3 and 4?"
    first, second = Predictor(adapted, plan).texts([dirty, plain])
    assert first["messages"] == [{"role": "user", "content": dirty}]
    assert first["answer"] == second["answer"]
    session = Session(Writer(adapted, max_new_tokens=4), system=" Be  short.")
    session.say(dirty)
    assert session.opening[0]["content"] == "Be short."
    assert session.turns[0]["content"] == plain
    with pytest.raises(DataError, match="the message is empty after cleaning"):
        session.say("<br>")
    assert len(session.turns) == 2
