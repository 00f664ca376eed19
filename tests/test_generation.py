"""Answers token by token: what is written, streamed and left out, in the library and on the command line."""

import builtins
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowres_ft import device
from lowres_ft.bundle import Bundle
from lowres_ft.errors import BundleError, DataError
from lowres_ft.generation import Session, Writer, require_chat
from lowres_ft.model import Adapted
from lowres_ft.pipeline import run
from lowres_ft.tasks.chat import Conversation
from tests import tiny_chat
from tests.conftest import Command, prepare

Bases = Callable[..., Path]
QUESTIONS = ("What is 3 and 4?", "Écoute 🦙", "How do you do?\nWell?")


@pytest.fixture
def adapted(chat_bases: Bases, chats: Path, tmp_path: Path) -> Callable[..., Adapted]:
    def make(architecture: str = "llama", *overrides: str, **changes: object) -> Adapted:
        plain = ["task.template=plain"] if architecture == "gpt2" else []
        wanted = tiny_chat.recipe(chat_bases(architecture, **changes), chats, *plain, *overrides)
        return prepare(wanted, tmp_path / f"{architecture}{len(list(tmp_path.iterdir()))}").adapted

    return make


def asked(text: str) -> Conversation:
    return Conversation("here", [{"role": "user", "content": text}])


def by_hand(writer: Writer, question: Conversation, most: int) -> str:
    """Take the likeliest token, one by one, without a cache."""
    ids = writer._prompt(question)
    said: list[int] = []
    while len(said) < most:
        with torch.inference_mode():
            token = int(writer.adapted.model(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax())
        said.append(token)
        if token in writer.ends:
            break
    return writer.adapted.tokenizer.decode(said, skip_special_tokens=True).strip()


@pytest.mark.parametrize("architecture", tiny_chat.BASES)
def test_an_answer_is_the_likeliest_one_and_its_pieces_are_the_whole(
    architecture: str, adapted: Callable[..., Adapted]
):
    model = adapted(architecture)
    model.model.generation_config.update(do_sample=True, temperature=0.3, top_k=2, repetition_penalty=3.0)
    writer = Writer(model, max_new_tokens=24)
    for question in map(asked, QUESTIONS):
        pieces: list[str] = []
        answer = writer(question, pieces.append)
        assert answer == by_hand(writer, question, 24)
        assert answer == writer(question)
        assert "".join(pieces) == answer
        assert all(pieces)


def test_an_end_of_turn_that_is_no_special_token_is_no_part_of_an_answer(
    chat_bases: Bases, chats: Path, tmp_path: Path
):
    base = shutil.copytree(chat_bases("gemma"), tmp_path / "base")
    held = json.loads((base / "tokenizer.json").read_text())
    (end,) = (token for token in held["added_tokens"] if token["content"] == "<end_of_turn>")
    end["special"] = False
    (base / "tokenizer.json").write_text(json.dumps(held))
    told = json.loads((base / "tokenizer_config.json").read_text())
    told["extra_special_tokens"] = ["<start_of_turn>"]
    (base / "tokenizer_config.json").write_text(json.dumps(told))
    model = prepare(tiny_chat.recipe(base, chats), tmp_path / "work").adapted
    assert model.tokenizer.decode([end["id"]], skip_special_tokens=True) == "<end_of_turn>"
    (letter,) = model.tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    favour(model, *(letter, letter, end["id"]) * 2)
    pieces: list[str] = []
    said = Writer(model, max_new_tokens=24)(asked("What?"), pieces.append)
    assert (said, "".join(pieces)) == ("aa", "aa")
    rows = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It<end_of_turn> is"}]
    with pytest.raises(DataError, match="holds <end_of_turn>"):
        model.task.encode(model.tokenizer, [Conversation("here", rows)])


def favour(model: Adapted, *tokens: int) -> None:
    """Make a model write these tokens in turn, whatever it is asked."""
    steps = iter(tokens)

    def write(module: object, inputs: object, logits: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros_like(logits)
        logits[:, -1, next(steps)] = 9.0
        return logits

    model.model.get_output_embeddings().register_forward_hook(write)


@pytest.mark.parametrize(
    ("architecture", "end"), [("llama", "<|im_end|>"), ("gemma", "<end_of_turn>"), ("gemma", "<eos>")]
)
def test_an_answer_stops_at_the_end_of_turn(architecture: str, end: str, adapted: Callable[..., Adapted]):
    model = adapted(architecture)
    words = model.tokenizer
    said = words("\n That is \n it 🦙é.  ", add_special_tokens=False)["input_ids"]
    favour(model, *said, words.convert_tokens_to_ids(end))
    pieces: list[str] = []
    assert Writer(model, max_new_tokens=100)(asked("What?"), pieces.append) == "That is \n it 🦙é."
    assert "".join(pieces) == "That is \n it 🦙é."
    assert len(pieces) > 5
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_longest_answer_is_the_recipes_unless_another_is_named(adapted: Callable[..., Adapted]):
    model = adapted("llama", "task.max_new_tokens=3")
    a = model.tokenizer.convert_tokens_to_ids("a")
    favour(model, *[a] * 8)
    assert Writer(model)(asked("What?")) == "aaa"
    assert Writer(model, max_new_tokens=5)(asked("What?")) == "aaaaa"


def test_above_temperature_zero_tokens_are_drawn(adapted: Callable[..., Adapted]):
    writer = Writer(adapted(), max_new_tokens=16, temperature=2.0)
    torch.manual_seed(0)
    assert len({writer(asked("What?")) for _ in range(4)}) > 1


def test_a_prompt_that_leaves_no_room_is_told(adapted: Callable[..., Adapted]):
    writer = Writer(adapted(), max_new_tokens=64)
    with pytest.raises(
        DataError, match=r"here: the conversation has \d+ tokens, and with 64 .* than the 256"
    ) as caught:
        writer(asked("Why? " * 100))
    assert "Shorten it" in caught.value.hint


# Sessions


def test_a_session_remembers_what_was_said(adapted: Callable[..., Adapted]):
    writer = Writer(adapted(), max_new_tokens=4)
    session = Session(writer, system="Be short.")
    first = session.say("What?")
    second = session.say("And?")
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And?"},
    ]
    assert second == writer(Conversation("", turns))
    session.reset()
    assert session.say("What?") == first


def test_a_session_leaves_its_oldest_turns_out_when_it_grows_too_long(adapted: Callable[..., Adapted]):
    session = Session(Writer(adapted(), max_new_tokens=4))
    for number in range(8):
        session.say(f"Question {number}. " * 3)
    assert session.forgotten > 0
    assert len(session.turns) == 2 * (8 - session.forgotten)
    assert session.turns[-2]["content"].startswith("Question 7")
    assert session.turns[0]["role"] == "user"
    with pytest.raises(DataError, match="this conversation: the conversation has"):
        session.say("Why? " * 200)
    assert session.turns == []
    session.say("What?")
    assert [turn["role"] for turn in session.turns] == ["user", "assistant"]


# The command line


@pytest.fixture
def bundle(chat_bases: Bases, chats: Path, tmp_path: Path) -> Bundle:
    return run(tiny_chat.recipe(chat_bases(), chats, "data.probe_rows=0"), tmp_path / "chat", device_name="cpu")


def answers(bundle: Bundle, *questions: str, most: int = 8) -> list[str]:
    writer = Writer(bundle.load(device.find("cpu"))[0], max_new_tokens=most)
    return [writer(asked(question)) for question in questions]


def shown(text: str) -> str:
    return "\n".join("".join(mark if mark.isprintable() else " " for mark in line) for line in text.split("\n"))


def test_chat_answers_each_line_of_a_pipe(lowres: Command, bundle: Bundle):
    (first,) = answers(bundle, "What?", most=5)
    typed = b"What?\n\n/reset\nWhat?\nAnd?\n"
    code, out, err = lowres("chat", bundle.folder, "--max-tokens", "5", typed=typed)
    assert (code, err) == (0, "")
    assert out.startswith(f"{shown(first)}\n{shown(first)}\n")
    session = Session(Writer(bundle.load(device.find("cpu"))[0], max_new_tokens=5), system="Be short.")
    said = "".join(shown(session.say(text)) + "\n" for text in ("What?", "And?"))
    assert (
        lowres("chat", bundle.folder, "--max-tokens", "5", "--system", "Be short.", typed=b"What?\nAnd?\n")[1] == said
    )


def test_chat_tells_when_it_forgets(lowres: Command, bundle: Bundle):
    typed = b"Why do you ask what it is? Why do you ask?\n" * 6
    code, out, err = lowres("chat", bundle.folder, typed=typed)
    assert code == 0
    assert set(err.splitlines()) == {"note: the first messages were left out: the conversation is too long"}
    assert lowres("chat", bundle.folder, "-q", typed=typed) == (0, out, "")


def test_half_a_character_is_told(lowres: Command, bundle: Bundle):
    code, out, err = lowres("chat", bundle.folder, "--system", "\udcff", typed=b"What?\n")
    assert (code, out) == (2, "")
    assert err.startswith("error: the system message is not UTF-8 (at character 1)")
    session = Session(Writer(bundle.load(device.find("cpu"))[0], max_new_tokens=2))
    with pytest.raises(DataError, match=r"the message is not UTF-8 \(at character 2\)"):
        session.say("W\udcff?")
    assert session.turns == []


def test_at_a_terminal_a_message_that_cannot_be_answered_ends_nothing(
    lowres: Command, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
):
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    lines = iter(["\udcff", "What?", ""])
    monkeypatch.setattr(builtins, "input", lambda _: next(lines))
    monkeypatch.setattr(io, "TextIOWrapper", Terminal)
    code, out, err = lowres("chat", bundle.folder, "--max-tokens", "5", "-q")
    assert (code, out) == (0, f"{shown(answers(bundle, 'What?', most=5)[0])}\n")
    assert err == "error: the message is not UTF-8 (at character 1)\n"


def test_predict_writes_answers_as_json_and_streams_them_plain(lowres: Command, bundle: Bundle, tmp_path: Path):
    first, second = answers(bundle, "What?", "How 🦙?")
    code, out, _ = lowres("predict", bundle.folder, "What?", "How 🦙?", "--json", "-q")
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == [
        {"messages": [{"role": "user", "content": "What?"}], "answer": first},
        {"messages": [{"role": "user", "content": "How 🦙?"}], "answer": second},
    ]
    code, out, _ = lowres("predict", bundle.folder, "What?", "How 🦙?", "-q")
    assert (code, out) == (0, f"{shown(first)}\n{shown(second)}\n")
    tiny_chat.chats(tmp_path / "asked.jsonl", tiny_chat.CHATS[:2])
    code, out, _ = lowres("predict", bundle.folder, "--file", tmp_path / "asked.jsonl", "--json", "-q")
    found = [json.loads(line)["messages"] for line in out.splitlines()]
    assert found == [row["messages"][:1] for row in tiny_chat.CHATS[:2]]
    code, out, _ = lowres("predict", bundle.folder, "--file", tmp_path / "asked.jsonl", "--out", tmp_path / "out", "-q")
    assert (code, out) == (0, "")
    assert (tmp_path / "out").read_text() == "".join(
        shown(answer) + "\n"
        for answer in answers(bundle, *(row["messages"][0]["content"] for row in tiny_chat.CHATS[:2]))
    )


def test_evaluate_prints_the_scores_of_a_chat_bundle(lowres: Command, bundle: Bundle, chats: Path):
    code, out, _ = lowres("evaluate", bundle.folder, "--data", chats)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["loss", "perplexity", "token_accuracy"]


def test_evaluate_tells_the_rows_that_are_left_out(lowres: Command, chat_bases: Bases, chats: Path, tmp_path: Path):
    made = run(tiny_chat.recipe(chat_bases(), chats, "task.too_long=drop"), tmp_path / "made", device_name="cpu")
    long = {"messages": [{"role": "user", "content": "What? " * 96}, tiny_chat.CHATS[0]["messages"][1]]}
    rows = tiny_chat.chats(tmp_path / "rows.jsonl", [*tiny_chat.CHATS, long])
    code, _, err = lowres("evaluate", made.folder, "--data", rows)
    assert (code, "".join(err.split())) == (0, "".join(f"note: 1 rows of {rows} are left out: {rows}:25".split()))
    assert lowres("evaluate", made.folder, "--data", rows, "-q")[2] == ""


def test_a_temperature_that_no_logits_bear_is_refused(lowres: Command, bundle: Bundle):
    code, _, errors = lowres("chat", bundle.folder, "--temperature", "1e-42", typed=b"What?\n")
    assert code == 2
    assert "take 0.01 at least, or 0" in errors


def test_chat_with_a_bundle_that_labels_is_refused(lowres: Command, trained: Callable[..., Bundle]):
    labels = trained()
    with pytest.raises(BundleError, match="was trained for classification, not for chat"):
        require_chat(labels)
    code, out, err = lowres("chat", labels.folder, typed=b"What?\n")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "hint: Use lowres-ft predict."


def test_a_run_prints_its_samples(
    lowres: Command, chat_bases: Bases, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(tiny_chat.recipe(chat_bases(), chats).to_yaml())
    code, out, _ = lowres("recipe", "mine.yaml", "--device", "cpu", "-q")
    assert code == 0
    assert out.count("  asked   What is ") == 2
    for when in ("wanted", "before", "after"):
        assert sum(line.startswith(f"    {when:<7} ") for line in out.splitlines()) == 2
    assert "untouched base" in out
