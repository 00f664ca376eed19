"""Chat templates: the tokens that are supervised are those of the answers and of the ends of their turns, no others."""

import re
import unicodedata
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lowres_ft import bases, readers
from lowres_ft.data import by_role
from lowres_ft.errors import DataError, ModelError
from lowres_ft.parts import ModelSpec
from lowres_ft.recipe import load_recipe
from lowres_ft.tasks import _templates
from lowres_ft.tasks._messages import Message
from lowres_ft.tasks.base import IGNORED, Encoded
from lowres_ft.tasks.chat import Chat, Conversation
from lowres_ft.tokenizing import load_tokenizer
from tests import tiny_chat

FORMS = (*tiny_chat.TEMPLATES, "plain")
_WORDS = [
    *("assistant", "user", "model", "<think>", "<|im_end", "im_start|>", "system\n", "User: ", "Assistant:", "{{ x }}"),
    *(" ", "  ", "\n", "\n\n", "\t", "answer", "What is", "?", "é", "e\u0301", "你好", "🦙", "▁", "\ufeff", "\r\n"),
]
TEXTS = st.lists(st.sampled_from(_WORDS) | st.text(max_size=8), min_size=1, max_size=6).map("".join)
TEXTS = TEXTS.filter(lambda text: text.strip() and _encodes(text) and "\ue000" not in text and "</think>" not in text)


def _encodes(text: str) -> bool:
    return not any("\ud800" <= mark <= "\udfff" for mark in text)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """One to three questions with their answers; some answers repeat their question."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        question = draw(TEXTS)
        found += [{"role": "user", "content": question}]
        found += [{"role": "assistant", "content": draw(st.just(question) | TEXTS)}]
    return found


@cache
def tokenizer(form: str) -> PreTrainedTokenizerFast:
    made = tiny_chat.tokenizer("gpt2" if form == "plain" else form)
    Chat(template="plain" if form == "plain" else "own").prepare(made)
    return made


def encoded(form: str, messages: list[Message]) -> Encoded:
    ((one,),) = Chat(max_length=100_000).encode(tokenizer(form), [Conversation("a:1", messages)])
    return one


def runs(form: str, one: Encoded) -> list[str]:
    """What is supervised: the text of each run of items."""
    chosen = [target != IGNORED for target in one.targets]
    marks = "".join("x" if wanted else "." for wanted in chosen)
    found = [one.targets[match.start() : match.end()] for match in re.finditer("x+", marks)]
    return [tokenizer(form).decode(ids, clean_up_tokenization_spaces=False) for ids in found]


def end(form: str) -> str:
    return tiny_chat.END.get(form, "<|endoftext|>")


def written(form: str, text: str) -> str:
    """A text as the template writes it and the tokenizer reads it."""
    if form in ("llama3", "gemma"):
        text = text.strip()
    if form == "qwen3":
        return unicodedata.normalize("NFC", text.lstrip("\n"))
    return text.replace("▁", " ") if form == "gemma" else text


@pytest.mark.parametrize("form", FORMS)
@given(messages=conversations())
@settings(max_examples=150, deadline=None)
@example(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "   a  b "}])
@example(messages=[{"role": "user", "content": "a\n"}, {"role": "assistant", "content": "\n b\n"}])
@example(messages=[{"role": "user", "content": "assistant\n"}, {"role": "assistant", "content": "assistant\n"}])
def test_the_supervised_tokens_are_the_answers_and_the_ends_of_their_turns(form: str, messages: list[Message]):
    one = encoded(form, messages)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    found = runs(form, one)
    assert len(found) == len(answers)
    for run, answer in zip(found, answers, strict=True):
        assert run.endswith(end(form))
        # Spaces of the template may be in one token with the answer's first ones.
        said, wanted = run.removesuffix(end(form)), written(form, answer)
        assert said.endswith(wanted)
        assert said.lstrip() == wanted.lstrip()


@pytest.mark.parametrize("form", FORMS)
@given(messages=conversations())
@settings(max_examples=50, deadline=None)
def test_a_target_is_the_token_that_follows(form: str, messages: list[Message]):
    one = encoded(form, messages)
    assert len(one.ids) == len(one.targets)
    pairs = zip(one.ids[1:], one.targets, strict=False)
    assert all(target in (IGNORED, token) for token, target in pairs)
    assert one.targets[-1] == IGNORED


@pytest.mark.parametrize("form", FORMS)
@given(messages=conversations())
@settings(max_examples=100, deadline=None)
def test_the_prompt_is_the_beginning_of_what_was_trained_on(form: str, messages: list[Message]):
    words = tokenizer(form)
    whole = _templates.render(words, messages, "a:1", _templates.turn_marks(words))
    prompt = _templates.prompt(words, messages[:-1], "a:1")
    assert whole.text.startswith(prompt)
    between = whole.text[len(prompt) : whole.answers[-1][0]]
    assert between == (" " if form == "plain" else "")


@pytest.mark.parametrize("form", FORMS)
def test_a_system_message_is_not_supervised_and_gemma_refuses_it(form: str):
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "That."},
    ]
    if form == "gemma":
        with pytest.raises(DataError, match=r"a:1: the base's chat template refuses .*System role not supported"):
            encoded(form, messages)
    else:
        assert [run.strip() for run in runs(form, encoded(form, messages))] == [f"That.{end(form)}"]


def test_a_question_after_the_last_answer_is_left_off():
    messages = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "That."},
        {"role": "user", "content": "And?"},
    ]
    for form in FORMS:
        assert encoded(form, messages) == encoded(form, messages[:2])


def test_qwen_is_trained_and_asked_without_thoughts():
    question = {"role": "user", "content": "What?"}
    one = encoded("qwen3", [question, {"role": "assistant", "content": "<think>"}])
    assert runs("qwen3", one) == ["<think><|im_end|>"]
    prompt = _templates.prompt(tokenizer("qwen3"), [question], "a:1")
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    for answer in ("<think>\nHm.\n</think>\n\nThat.", "</think>That."):
        with pytest.raises(DataError, match="a:1: the chat template changes message 2") as caught:
            encoded("qwen3", [question, {"role": "assistant", "content": answer}])
        assert "<think>" in caught.value.hint


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_with_a_special_token_is_refused(form: str):
    messages = [{"role": "user", "content": end(form)}, {"role": "assistant", "content": f"That.{end(form)}"}]
    with pytest.raises(DataError, match=rf"a:1: message 2 holds {re.escape(end(form))}, a special token") as caught:
        encoded(form, messages)
    assert "plain text" in caught.value.hint
    messages[1]["content"] = "That."
    assert len(runs(form, encoded(form, messages))) == 1


def test_characters_that_the_tokenizer_cannot_write_are_refused_in_answers_alone():
    words = tiny_chat.tokenizer("smollm2")
    held = words.backend_tokenizer.to_str().replace('"ð":', '"gone":')  # the first byte of an emoji
    words = PreTrainedTokenizerFast(
        tokenizer_object=type(words.backend_tokenizer).from_str(held), **tiny_chat._SPECIAL["smollm2"]
    )
    words.chat_template = tiny_chat.TEMPLATES["smollm2"]
    asked, answer = {"role": "user", "content": "What? 🦙"}, {"role": "assistant", "content": "That. 🦙"}
    with pytest.raises(DataError, match="a:1: the base's tokenizer has no tokens for '🦙'"):
        Chat().encode(words, [Conversation("a:1", [asked, answer])])
    ((one,),) = Chat().encode(words, [Conversation("a:1", [asked, answer | {"content": "That."}])])
    assert words.decode([target for target in one.targets if target != IGNORED]) == "That.<|im_end|>"


@pytest.mark.parametrize("form", FORMS)
def test_the_ends_of_turns_are_known_for_generation(form: str):
    words = tokenizer(form)
    expected = {words.convert_tokens_to_ids(end(form)), words.eos_token_id}
    assert _templates.turn_ends(words) == sorted(expected)


def test_plain_begins_as_the_bases_own_texts_do():
    question = [{"role": "user", "content": "What?"}]
    for form, before in (("gpt2", ""), ("gemma", "<bos>"), ("llama3", "<|begin_of_text|>")):
        words = tiny_chat.tokenizer(form)
        Chat(template="plain").prepare(words)
        assert _templates.prompt(words, question, "a:1") == f"{before}User: What?\n\nAssistant:"


def test_a_base_without_a_template_is_refused():
    with pytest.raises(ModelError, match="the base has no chat template") as caught:
        Chat().prepare(tiny_chat.tokenizer("gpt2"))
    assert "task.template=plain" in caught.value.hint


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="Slow does not tell where a token stands"):
        Chat().prepare(Slow())  # type: ignore[arg-type]


TURNS = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"


def test_a_template_that_ends_no_turn_gets_the_end_of_text():
    words = tiny_chat.tokenizer("gpt2")
    words.chat_template = TURNS
    Chat().prepare(words)
    messages = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "That."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "This."},
    ]
    ((one,),) = Chat().encode(words, [Conversation("a:1", messages)])
    supervised = words.decode([target for target in one.targets if target != IGNORED])
    assert supervised == "That.This.<|endoftext|>"
    assert _templates.turn_ends(words) == [words.eos_token_id]


@pytest.mark.parametrize(
    ("template", "asked"),
    [
        (TURNS, "[user] What?\n[assistant]"),
        (TURNS.replace("] ", "]\n"), "[user]\nWhat?\n[assistant]\n"),
        (TURNS.replace("[{{", "\"🦙'{{"), "\"🦙'user] What?\n\"🦙'assistant]"),
    ],
)
def test_a_template_that_never_asks_for_an_answer_is_completed_once(template: str, asked: str):
    words = tiny_chat.tokenizer("gpt2")
    words.chat_template = template
    Chat().prepare(words)
    Chat().prepare(words)
    question = [{"role": "user", "content": "What?"}]
    assert _templates.prompt(words, question, "a:1") == asked
    text = _templates.render(words, [*question, {"role": "assistant", "content": "That."}], "a:1", ()).text
    assert text == f"{asked}{'' if asked.endswith(chr(10)) else ' '}That.<|endoftext|>"


@pytest.mark.parametrize("opening", ["<|im_start|>assistant\n<think>\n", "Answer:"])
def test_a_template_that_asks_otherwise_than_it_answers_is_refused(opening: str):
    words = tiny_chat.tokenizer("smollm2")
    words.chat_template = TURNS + f"{{% if add_generation_prompt %}}{opening}{{% endif %}}"
    with pytest.raises(ModelError, match=r"asks for an answer with .* but writes answers after") as caught:
        Chat().prepare(words)
    assert "task.template=plain" in caught.value.hint


def test_many_added_tokens_cost_a_row_nothing():
    words = tiny_chat.tokenizer("gemma")
    words.add_tokens([f"<unused{number}>" for number in range(3000)])
    asked = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    looked = []

    class Counted(type(words)):
        @property
        def added_tokens_decoder(self):
            looked.append(self)
            return super().added_tokens_decoder

    words.__class__ = Counted
    Chat().encode(words, [Conversation("a:1", asked)] * 9)
    assert 0 < len(looked) < 9


def test_a_base_that_could_never_stop_is_refused():
    words = tiny_chat.tokenizer("gpt2")
    words.chat_template = TURNS
    words.eos_token = None
    with pytest.raises(ModelError, match="answers would never end"):
        Chat().prepare(words)
    with pytest.raises(ModelError, match="which this base has not"):
        Chat(template="plain").prepare(words)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'] }}", "does not write each answer once"),
        ("{% for m in messages %}{{ m['content'] | upper }}<|endoftext|>{% endfor %}", "does not write each answer"),
        ("{% for m in messages %}{{ m['content'] | length }}{{ m['content'] }}{% endfor %}", "changes message 2"),
        ("{% for m in messages %}{{ m['content'] }}{{ m['content'] | length }}{% endfor %}", "changes message 2"),
        ("{{ messages | nothing }}", "refuses this conversation: No filter named"),
        ("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}", "refuses this conversation"),
        ("{{ 1 / 0 }}", "refuses this conversation: division by zero"),
        ("{% for n in range(10 ** 9) %}{% endfor %}", "refuses this conversation"),
        ("{{ 'a'.encode('zzz') }}", "refuses this conversation: unknown encoding"),
    ],
)
def test_a_template_in_which_answers_cannot_be_told_is_refused(template: str, message: str):
    words = tiny_chat.tokenizer("gpt2")
    words.chat_template = template
    asked = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "That is it."}]
    with pytest.raises(DataError, match=message):
        _templates.render(words, asked, "a:1", _templates.turn_marks(words))


@pytest.mark.assets
def test_every_row_of_the_dialogs_trains_the_real_smollm_on_its_answers():
    recipe = load_recipe("chat-lora-int8")
    task = recipe.task.model_copy(update={"max_length": 8192})
    words = load_tokenizer(bases.resolve(ModelSpec(base=recipe.model.base)).folder)
    task.prepare(words)
    ends = words.eos_token_id
    assert ends == words.pad_token_id
    rows = 0
    for where, row in readers.rows(recipe.data.train):
        example = task.read(by_role(row, where, task.forms, {}), where)
        ((one,),) = task.encode(words, [example])
        supervised = [target for target in one.targets if target != IGNORED]
        answers = [message["content"] for message in example.messages if message["role"] == "assistant"]
        assert words.decode(supervised) == "".join(f"{answer}<|im_end|>" for answer in answers), where
        assert supervised.count(ends) == len(answers)
        rows += 1
    assert rows > 2000


@pytest.mark.assets
def test_the_real_smollm_refuses_answers_that_it_has_no_bytes_for():
    task = Chat()
    words = load_tokenizer(bases.resolve(ModelSpec(base="starter:smollm2-135m")).folder)
    task.prepare(words)
    asked = {"role": "user", "content": "What?"}
    for mark in ("\x13", "\U00040000"):
        with pytest.raises(DataError, match="has no tokens for"):
            task.encode(words, [Conversation("a:1", [asked, {"role": "assistant", "content": f"That{mark}."}])])
