"""`lowres-ft new`: what is guessed of a data file, and the recipe that is written."""

import json
from pathlib import Path
from typing import Any

import pytest

from lowres_ft import data, load_recipe, yaml12
from lowres_ft.errors import DataError, OutputError, RecipeError
from lowres_ft.guess import new


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(header: str, *rows: str, repeat: int = 10, name: str = "mine.csv") -> str:
    """A CSV of the rows over and over; `#` in a row is its number."""
    lines = [row.replace("#", str(number)) for number in range(repeat) for row in rows]
    Path(name).write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return name


def guessed(source: str, start: str = "sentiment-lora") -> dict[str, Any]:
    """What is written beside the starting recipe's own."""
    new("mine", start, source)
    found: dict[str, Any] = yaml12.loads(Path("mine.yaml").read_text(encoding="utf-8"), where="mine.yaml")
    return found


@pytest.mark.parametrize(
    ("header", "rows", "columns", "labels"),
    [
        ("text,label", ("film #,good", "film -#,bad"), None, ["bad", "good"]),
        ("review,stars", ("film #,5", "film -#,1", "or #,3"), {"text": "review", "label": "stars"}, ["1", "3", "5"]),
        ("stars,review", ("10,film #", "9,film -#"), {"text": "review", "label": "stars"}, ["9", "10"]),
        ("id,Text,Label", ("#,film #,yes", "-#,film -#,no"), {"text": "Text", "label": "Label"}, ["no", "yes"]),
        ("id,a,b", ("#,film number #,x", "-#,film number -#,y"), {"text": "a", "label": "b"}, ["x", "y"]),
        ("a,source,category", ("film #,web,x", "film -#,app,y"), {"text": "a", "label": "category"}, ["x", "y"]),
        ("a,b,c", ("film #,x,1", "film -#,y,2", "no film #,y,3"), {"text": "a", "label": "b"}, ["x", "y"]),
        ("text,label,notes", ("film #,好 a,long long long long #", "film -#,坏,"), None, ["坏", "好 a"]),
    ],
)  # fmt: skip
def test_columns_and_labels_are_guessed(
    header: str, rows: tuple[str, ...], columns: dict[str, str] | None, labels: list[str]
):
    found = guessed(write(header, *rows))
    assert found["data"] == {"train": "mine.csv"} | ({"columns": columns} if columns else {})
    assert found["task"]["labels"] == labels


def test_what_was_guessed_is_told():
    source = write("review,stars", "12345678,5", "1234,1", "1234,1")
    assert new("mine", "sentiment-lora", source) == {
        "path": "mine.yaml",
        "guessed": [
            "text: column 'review', 5 characters on average",
            "label: column 'stars', 2 labels: '1' (20), '5' (10)",
        ],
    }


def test_the_recipe_that_is_written_reads_its_data(folder: Path):
    source = write("review,stars", "film #,5", "film -#,1", "no film #,3")
    new("mine", "sentiment-lora-int8", source)
    recipe = load_recipe("mine.yaml")
    assert (recipe.name, recipe.summary) == ("mine", "Tell 1, 3, 5 apart.")
    assert recipe.model.quantize == "int8"
    assert recipe.task.max_length == 128
    found = data.load(recipe, folder)
    assert sum(len(rows) for rows in found.splits().values()) == 30


def test_labels_that_yaml_reads_as_something_else_come_back(folder: Path):
    new("mine", "sentiment-lora", write("text,label", "film #,no", "film -#,null", "no film #,1e3", "none #,~"))
    assert load_recipe("mine.yaml").task.labels == ("1e3", "no", "null", "~")  # type: ignore[attr-defined]


def test_more_labels_than_are_listed_are_counted():
    found = new("mine", "sentiment-lora", write("text,label", *(f"film # {label},{label}" for label in range(30))))
    assert found["guessed"][1].endswith("'9' (10) and 20 more")
    assert load_recipe("mine.yaml").summary == "Tell 30 labels apart."


def test_json_numbers_and_truth_values_are_labels():
    rows = [{"text": f"film {number}", "label": number % 2 == 0, "score": None} for number in range(20)]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert guessed("mine.jsonl")["task"]["labels"] == ["false", "true"]


def test_a_file_sorted_by_label_is_read_to_its_end():
    lines = [f"film {number},{'good' if number < 25_000 else 'bad'}" for number in range(25_010)]
    Path("mine.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    assert guessed("mine.csv")["task"]["labels"] == ["bad", "good"]


def test_without_data_the_starting_recipe_is_copied_under_the_name():
    assert new("mine", "sentiment-full", None) == {"path": "mine.yaml", "guessed": []}
    mine, start = load_recipe("mine.yaml"), load_recipe("sentiment-full")
    assert mine == start.model_copy(update={"name": "mine"})


def test_a_starting_recipe_without_a_task_takes_the_guessed_one():
    Path("start.yaml").write_text("name: start\nmodel: {base: some/base}\nmethod: {kind: lora}\n")
    assert guessed(write("text,label", "film #,x", "film -#,y"), "start.yaml")["task"]["labels"] == ["x", "y"]


ASKED, SAID = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}
TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]


def rows(*rows: dict[str, Any], name: str = "mine.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": [ASKED, SAID]}, "messages (3)"),
        ({"conversations": TURNS}, "conversations (3)"),
        ({"instruction": "What?", "input": "", "output": "That."}, "instruction and output and input (3)"),
        ({"prompt": "What?", "completion": "That.", "label": "a"}, "prompt and completion (3)"),
    ],
)
def test_conversations_start_from_the_chat_recipe(row: dict[str, Any], told: str, folder: Path):
    found = new("mine", None, rows(row, row, row))
    assert found["guessed"] == [
        "starting from chat-lora-int8; another one is named with --from",
        f"chat: the first 3 rows can be read; what they hold is {told}",
    ]
    mine, start = load_recipe("mine.yaml"), load_recipe("chat-lora-int8")
    assert (mine.task, mine.model, mine.method, mine.train) == (start.task, start.model, start.method, start.train)
    assert mine.data == start.data.model_copy(update={"train": "mine.jsonl"})
    assert mine.summary == "The task chat, learned from mine.jsonl."


def test_words_and_tags_start_from_the_recipe_of_entities(folder: Path):
    Path("mine.conll").write_text("Ann B-name\nsleeps O\n\nBob B-name\n")
    found = new("mine", None, "mine.conll")
    assert found["guessed"] == [
        "starting from entities-lora; another one is named with --from",
        "ner: the first 2 rows can be read; what they hold is words and tags (2)",
    ]
    assert load_recipe("mine.yaml").data.train == "mine.conll"


def test_texts_and_labels_start_from_the_recipe_of_sentiment():
    found = new("mine", None, write("text,label", "film #,good", "film -#,bad"))
    assert found["guessed"][0] == "starting from sentiment-lora; another one is named with --from"
    assert load_recipe("mine.yaml").task.kind == "classification"
    Path("mine.yaml").unlink()
    assert new("mine", None, None)["guessed"] == []
    assert load_recipe("mine.yaml").method == load_recipe("sentiment-lora").method


def test_the_task_of_the_recipe_that_is_named_stays():
    mixed = rows({"text": "What?", "answer": "That."}, {"messages": [ASKED, SAID]}, {"text": "Why?", "answer": "So."})
    found = new("mine", "chat-lora-int8", mixed)
    assert found["guessed"] == [
        "chat: the first 3 rows can be read; what they hold is text and answer (2); messages (1)"
    ]


def test_what_belongs_to_the_other_source_is_left_behind():
    start = load_recipe("entities-lora").model_dump(mode="json")
    start["task"]["labels"] = ["person"]
    start["data"] |= {"columns": {"words": "3"}, "test": "other.conll", "validation": 0.2, "limit": 7}
    Path("start.yaml").write_text(yaml12.dumps(start))
    Path("mine.conll").write_text("Ann B-name\nsleeps O\n")
    new("mine", "start.yaml", "mine.conll")
    mine = load_recipe("mine.yaml")
    assert mine.task.labels is None  # type: ignore[attr-defined]
    assert (mine.data.columns, mine.data.validation, mine.data.test, mine.data.limit) == ({}, 0.2, 0.1, None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ASKED]}, r"mine\.jsonl:2: no message is the assistant's"),
        ({"question": "What?"}, r"mine\.jsonl:2: no column 'messages'"),
    ],
)
def test_rows_that_the_task_cannot_read_are_told_and_nothing_is_written(row: dict[str, Any], message: str):
    source = rows({"messages": [ASKED, SAID]}, row)
    with pytest.raises(DataError, match=message):
        new("mine", "chat-lora-int8", source)
    assert not Path("mine.yaml").exists()


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        ("a,b\n1,2\n3,4\n", r"mine\.csv: no column has between 2 and 200 values .*'a' \(2\), 'b' \(2\)", "columns"),
        ("text,label\na,x\nb,x\n", r"mine\.csv: no column has between 2 and 200 values", "{text: NAME, label: NAME}"),
        ("label\nx\nx\ny\n", r"mine\.csv: there is no column beside 'label'", "A text and a label are needed"),
        ("text,label\na,x\nb,\nc,y\nd,\n", r"mine\.csv:3: the label is empty, in 2 rows", "Fill or remove"),
        ("text,label\na,x\nb,X\n", r"mine\.csv:3: the label 'X' differs from 'x' \(mine\.csv:2\)", "alike"),
        ("text,label\na,x\nb\n", r"mine\.csv:3: 1 field", "commas"),
        ("", r"mine\.csv is empty", "saved"),
    ],
)
def test_data_that_cannot_be_guessed_is_told_and_nothing_is_written(content: str, message: str, hint: str):
    Path("mine.csv").write_text(content)
    with pytest.raises(DataError, match=message) as error:
        new("mine", "sentiment-lora", "mine.csv")
    assert hint in error.value.hint
    assert not Path("mine.yaml").exists()


def test_many_values_are_told_as_more():
    rows = "\n".join(f"{number},{number}" for number in range(300))
    Path("mine.csv").write_text(f"a,b\n{rows}\n")
    with pytest.raises(DataError, match=r"values by column: 'a' \(more\), 'b' \(more\)$"):
        new("mine", "sentiment-lora", "mine.csv")


def test_a_recipe_that_exists_is_left_alone():
    Path("mine.yaml").write_text("mine")
    with pytest.raises(OutputError, match=r"mine\.yaml exists"):
        new("mine", "sentiment-lora", None)
    assert Path("mine.yaml").read_text() == "mine"


def test_a_name_that_no_recipe_can_have_writes_nothing(folder: Path):
    with pytest.raises(RecipeError, match="name: "):
        new("my film", "sentiment-lora", None)
    assert list(folder.iterdir()) == []
