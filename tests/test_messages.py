"""Conversations as people keep them: every form, read from files; what is wrong with one, in one error."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lowres_ft import data
from lowres_ft.data import by_role
from lowres_ft.errors import DataError
from lowres_ft.recipe import parse
from lowres_ft.tasks.chat import Chat
from tests import tiny_chat

ASKED = {"role": "user", "content": "What is it?"}
SAID = {"role": "assistant", "content": " That. "}
SYSTEM = {"role": "system", "content": "Be short."}
FORMS: list[tuple[dict[str, Any], list[dict[str, str]]]] = [
    ({"messages": [ASKED, SAID]}, [ASKED, SAID]),
    ({"messages": [SYSTEM, ASKED, SAID, ASKED, SAID]}, [SYSTEM, ASKED, SAID, ASKED, SAID]),
    ({"messages": [ASKED, SAID, ASKED]}, [ASKED, SAID, ASKED]),
    ({"messages": [ASKED, SAID | {"tool_calls": None, "weight": 1}]}, [ASKED, SAID]),
    (
        {"conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": " That. "}]},
        [ASKED, SAID],
    ),
    ({"conversations": [ASKED, SAID], "system": "Be short."}, [SYSTEM, ASKED, SAID]),
    ({"conversations": [SYSTEM, ASKED, SAID], "system": "Be short."}, [SYSTEM, ASKED, SAID]),
    ({"conversations": [ASKED, SAID], "system": None}, [ASKED, SAID]),
    ({"instruction": "What is it?", "output": " That. "}, [ASKED, SAID]),
    ({"instruction": "What is it?", "input": "", "output": " That. "}, [ASKED, SAID]),
    (
        {"instruction": "What", "input": "is it?", "output": " That. ", "system": "Be short."},
        [SYSTEM, ASKED | {"content": "What\n\nis it?"}, SAID],
    ),
    ({"prompt": "What is it?", "completion": " That. ", "id": 7}, [ASKED, SAID]),
    ({"text": "What is it?", "answer": " That. "}, [ASKED, SAID]),
]


def jsonl(folder: Path, *rows: Any) -> Path:
    return tiny_chat.chats(folder / "chat.jsonl", rows)


def parquet(folder: Path, *rows: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), folder / "chat.parquet")
    return folder / "chat.parquet"


def read(path: Path, work: Path, **columns: str) -> list[list[dict[str, str]]]:
    """The conversations of a file, as a run reads it."""
    source = {"train": str(path), "validation": None, "test": None, "columns": columns}
    raw = {
        "name": "chat",
        "task": {"kind": "chat"},
        "model": {"base": "nowhere"},
        "method": {"kind": "lora"},
        "data": source,
    }
    found = data.load(parse(raw), work)
    return sorted((one.messages for one in found.train.examples(found.task)), key=str)


@pytest.mark.parametrize("write", [jsonl, parquet])
@pytest.mark.parametrize(("row", "messages"), FORMS)
def test_every_form_is_read(row: dict[str, Any], messages: list[dict[str, str]], write: Any, tmp_path: Path):
    assert read(write(tmp_path, row), tmp_path) == [messages]


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_messages_with_either_names_of_their_keys_are_read_from_one_file(write: Any, tmp_path: Path):
    """In Parquet each message has all keys, most of them empty."""
    mixed = [ASKED, {"from": "gpt", "value": " That. "}]
    assert read(write(tmp_path, {"messages": mixed}), tmp_path) == [[ASKED, SAID]]


def test_columns_of_other_names_are_mapped(tmp_path: Path):
    path = tmp_path / "chat.csv"
    path.write_text("frage,antwort\nWhat is it?, That. \n")
    assert read(path, tmp_path, text="frage", answer="antwort") == [[ASKED, SAID]]
    assert read(path, tmp_path, prompt="frage", completion="antwort") == [[ASKED, SAID]]
    listed = jsonl(tmp_path, {"dialog": [ASKED, SAID]})
    assert read(listed, tmp_path, messages="dialog") == [[ASKED, SAID]]


def test_mapped_columns_decide_where_a_row_has_those_of_another_form_too(tmp_path: Path):
    row = {"instruction": "Why?", "output": "So.", "frage": "What is it?", "antwort": " That. "}
    assert read(jsonl(tmp_path, row), tmp_path, text="frage", answer="antwort") == [[ASKED, SAID]]
    with pytest.raises(DataError, match="no column 'fragen'"):
        read(jsonl(tmp_path, row), tmp_path, text="fragen", answer="antwort")


def test_a_system_message_that_says_nothing_is_passed_over():
    blank = {"role": "system", "content": ""}
    assert Chat().read({"messages": [blank, ASKED, SAID]}, "a:1").messages == [ASKED, SAID]
    with pytest.raises(DataError, match="a:1: message 1: what the system says is empty"):
        Chat().read({"messages": [blank]}, "a:1")


def test_rows_of_different_forms_stand_in_one_file(tmp_path: Path):
    path = jsonl(tmp_path, FORMS[0][0], FORMS[8][0] | {"instruction": "Why?"})
    assert read(path, tmp_path) == [[ASKED, SAID], [ASKED | {"content": "Why?"}, SAID]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ASKED]}, "no message is the assistant's, so there is nothing to learn"),
        ({"messages": [SYSTEM]}, "no message is the assistant's"),
        ({"messages": []}, r"messages is \[\], not a list of messages"),
        ({"messages": None}, "messages is None, not a list of messages"),
        ({"messages": "Hello."}, "messages is 'Hello.', not a list of messages"),
        ({"messages": {"role": "user"}}, "messages is {'role': 'user'}, not a list"),
        ({"messages": ["Hello."]}, "message 1 is 'Hello.', not an object"),
        ({"messages": [ASKED | {"role": "asistant"}]}, r"message 1 has the role 'asistant' \(did you mean 'assistant'"),
        ({"messages": [ASKED, SAID | {"role": "tool"}]}, "message 2 has the role 'tool'"),
        ({"messages": [ASKED | {"role": ["user"]}]}, r"message 1 has the role \['user'\]"),
        ({"messages": [ASKED | {"role": 3}]}, "message 1 has the role 3"),
        ({"messages": [{"content": "Hello."}]}, "message 1 has no role"),
        ({"messages": [ASKED, SAID | {"tool_calls": [{"id": "1"}]}]}, "message 2 has tool_calls, which cannot be"),
        ({"messages": [ASKED, SAID | {"content": None, "function_call": {"a": 1}}]}, "message 2 has function_call"),
        ({"messages": [ASKED, SAID | {"weight": 0}]}, "message 2 has the weight 0, but all answers count alike"),
        ({"messages": [ASKED, SAID | {"content": ""}]}, "message 2: the answer is empty"),
        ({"messages": [ASKED, SAID | {"content": " \n"}]}, "message 2: the answer is empty"),
        ({"messages": [ASKED, SAID | {"content": None}]}, "message 2: the answer is empty"),
        ({"messages": [ASKED, SAID | {"content": 4}]}, "message 2: the answer is 4, which is not text"),
        ({"messages": [ASKED | {"content": ""}, SAID]}, "message 1: what the user says is empty"),
        ({"messages": [ASKED | {"content": [{"type": "text"}]}]}, r"message 1: what the user says is \[\{'type'"),
        ({"messages": [ASKED, ASKED, SAID]}, "messages 1 and 2 are both the user's"),
        ({"messages": [ASKED, SAID, SAID]}, "messages 2 and 3 are both the assistant's"),
        ({"messages": [SAID, ASKED, SAID]}, "message 1 is an answer, but no question stands before it"),
        ({"messages": [SYSTEM, SAID]}, "message 2 is an answer, but no question stands before it"),
        ({"messages": [ASKED, SAID, SYSTEM]}, "message 3 is a system message, which can only be the first"),
        ({"conversations": [ASKED, SAID], "system": 3}, "the system message is 3, which is not text"),
        ({"conversations": [SYSTEM, ASKED, SAID], "system": "Be long."}, "the column system says otherwise"),
        ({"instruction": "", "output": "That."}, "the instruction is empty"),
        ({"instruction": "What?", "output": ""}, "the output is empty"),
        ({"instruction": "What?", "output": None}, "the output is empty"),
        ({"instruction": "What?", "input": 5, "output": "That."}, "the input is 5, which is not text"),
        ({"prompt": "What?", "completion": {"a": 1}}, r"the completion is \{'a': 1\}, which is not text"),
        ({"text": 1.5, "answer": "That."}, "the text is 1.5, which is not text"),
        ({"prompt": "\ud800", "completion": "That."}, "the prompt holds half a character"),
        ({"prompt": "What?", "answer": "That."}, "no column 'completion'"),
        ({"text": "What?", "label": "x"}, "no column 'answer'"),
        ({"question": "What?", "reply": "That."}, "no column 'messages'"),
    ],
)
def test_what_is_no_conversation_is_one_error_with_file_and_line(row: Any, message: str, tmp_path: Path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(FORMS[0][0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"^{path}:2: {message}") as caught:
        read(path, tmp_path)
    assert caught.value.hint
    assert len(caught.value.message.splitlines()) == 1


def test_a_bad_row_of_parquet_is_named_too(tmp_path: Path):
    path = parquet(tmp_path, {"messages": [ASKED, SAID]}, {"messages": [ASKED]})
    with pytest.raises(DataError, match=r"chat\.parquet:row 2: no message is the assistant's"):
        read(path, tmp_path)


def test_several_bad_rows_are_told_at_once(tmp_path: Path):
    path = jsonl(tmp_path, {"messages": [ASKED]}, {"messages": [ASKED, SAID]}, {"messages": [SAID]})
    with pytest.raises(DataError, match=r"jsonl:1: .*\n .*jsonl:3: "):
        read(path, tmp_path)


def question(row: dict[str, Any]) -> list[dict[str, str]]:
    task = Chat()
    return task.question(by_role(row, "a:1", task.forms, {}, labelled=False), "a:1").messages


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [ASKED]}, [ASKED]),
        ({"messages": [SYSTEM, ASKED, SAID]}, [SYSTEM, ASKED]),
        ({"messages": [ASKED, SAID, ASKED]}, [ASKED, SAID, ASKED]),
        ({"prompt": "What is it?"}, [ASKED]),
        ({"prompt": "What is it?", "completion": "That."}, [ASKED]),
        ({"instruction": "What", "input": "is it?"}, [ASKED | {"content": "What\n\nis it?"}]),
        ({"text": "What is it?"}, [ASKED]),
    ],
)
def test_a_question_is_read_without_its_last_answer(row: dict[str, Any], messages: list[dict[str, str]]):
    assert question(row) == messages


def test_a_text_alone_is_a_question():
    assert Chat().bare("What is it?", "text 1").messages == [ASKED]
    with pytest.raises(DataError, match="text 1: the text is empty"):
        Chat().bare(" ", "text 1")


def test_a_system_message_alone_is_no_question():
    with pytest.raises(DataError, match="a:1: no message is a user's, so there is nothing to answer"):
        question({"messages": [SYSTEM]})
