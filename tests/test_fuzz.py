"""What fuzzing found, and a short run of it over every reader: see tests/fuzz.py."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowres_ft import assets, bases, profiles, recipe, spec
from lowres_ft.errors import AssetError, LowresError, ModelError, RecipeError
from lowres_ft.parts import ModelSpec
from lowres_ft.tokenizing import load_tokenizer
from tests import fuzz, tiny

FILES = 40  # for each reader; `python -m tests.fuzz` runs as long as one likes
SLOW = {"model.safetensors": 10, "config.json": 20, "verify": 10, "predict": 10}
NAMES = (
    *("csv", "tsv", "jsonl", "json", "parquet", "conll", "recipe", "overrides", "lowres.json", "adapter_config.json"),
    *("recipe.yaml", "adapter_model.safetensors", "probe.safetensors", "config.json", "tokenizer.json"),
    *("tokenizer_config.json", "model.safetensors", "model.safetensors.index.json", "gguf", "verify", "predict"),
)


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz.Reader]:
    return fuzz.readers(tmp_path_factory.mktemp("fuzz"))


def test_every_reader_is_named(readers: dict[str, fuzz.Reader]):
    assert sorted(readers) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_read_or_refused(readers: dict[str, fuzz.Reader], tmp_path: Path, name: str):
    reader = readers[name]
    assert fuzz.attempt(reader, reader.sound) is None
    assert reader.taken == 1
    fuzz.fuzz(reader, 0, tmp_path, files=SLOW.get(name, FILES))
    assert not reader.findings, next(iter(reader.findings.values())).trace
    assert reader.tried == SLOW.get(name, FILES)


@pytest.mark.parametrize(
    "read",
    [lambda _: 1 / 0, lambda _: [][1], lambda path: path.read_bytes().decode("ascii")],
    ids=["arithmetic", "index", "encoding"],
)
def test_a_reader_that_breaks_is_found_and_its_file_kept(tmp_path: Path, read: Callable[[Path], Any]):
    reader = fuzz.Reader("broken", b"\xff" * 50, tmp_path / "file", read)
    fuzz.fuzz(reader, 7, tmp_path, files=3)
    (finding,) = reader.findings.values()
    assert finding.file.name == "broken.7"
    assert finding.file.read_bytes() == fuzz.damaged(reader, 7)
    assert reader.place.read_bytes() == reader.sound


def test_a_reader_that_hangs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def forever(_: Path) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzz, "LIMIT", 0.1)
    assert "Hang" in str(fuzz.attempt(fuzz.Reader("slow", b"", tmp_path / "file", forever), b""))


# Findings


def change(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "damage",
    [
        lambda words: words["post_processor"]["special_tokens"].pop("[SEP]"),  # panics at the first pair of texts
        lambda words: words["post_processor"].update(single=[{"SpecialToken": {"id": "[X]", "type_id": 0}}]),  # or text
        lambda words: words["model"]["vocab"].pop("[UNK]"),  # raises at the first unknown word
        lambda words: words["model"].update(unk_token="\ud800"),
    ],
    ids=["template", "template of one text", "unknown word", "half a character"],
)
def test_a_tokenizer_that_breaks_at_its_first_text_is_refused(tmp_path: Path, damage: Callable[[dict], object]):
    folder = tiny.base(tmp_path / "base")
    change(folder / "tokenizer.json", damage)
    with pytest.raises(ModelError, match="no tokenizer can be loaded"):
        load_tokenizer(folder)


def test_a_tokenizer_whose_unknown_word_is_unknown_is_refused(tmp_path: Path):
    folder = tiny.base(tmp_path / "base")
    change(folder / "tokenizer_config.json", lambda words: words.update(unk_token="", pad_token=""))
    with pytest.raises(ModelError, match="unk_token '' is not in its vocabulary"):
        load_tokenizer(folder)


def test_a_token_that_is_longer_than_any_text_is_refused_and_a_long_template_is_not(tmp_path: Path):
    folder = tiny.base(tmp_path / "base")
    change(folder / "tokenizer_config.json", lambda words: words.update(chat_template="[MASK]" * 200))
    load_tokenizer(folder)
    change(folder / "tokenizer_config.json", lambda words: words.update(mask_token="[MASK]" * 200))
    with pytest.raises(ModelError, match=r"tokenizer_config\.json holds a text of 1,200 characters"):
        load_tokenizer(folder)


def test_names_in_a_tokenizer_that_compiled_code_prints_stay_off_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    folder = tiny.base(tmp_path / "base")
    change(folder / "tokenizer.json", lambda words: words["added_tokens"][0].update({"\x1b[2J": 1}))
    capfd.readouterr()
    load_tokenizer(folder)
    print("shown again")
    assert capfd.readouterr() == ("shown again\n", "")


@pytest.mark.parametrize(
    ("key", "value"), [("num_hidden_layers", 2000), ("num_hidden_layers", 1e30), ("num_attention_heads", 2**40)]
)
def test_a_model_without_measure_is_refused_before_it_is_built(tmp_path: Path, key: str, value: float):
    folder = tiny.base(tmp_path / "base")
    change(folder / "config.json", lambda config: config.update({key: value}))
    base = bases.resolve(ModelSpec(base=str(folder)))
    with pytest.raises(ModelError, match=f"{key} is .* which no model has"):
        profiles.profile(base, recipe.load_recipe("sentiment-lora").task)


def test_a_gguf_list_that_is_longer_than_its_file_is_refused_at_once(tmp_path: Path):
    path = tiny.gguf(tmp_path / "model.gguf")
    content = bytearray(path.read_bytes())
    at = content.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    content[at : at + 8] = (2**40).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(AssetError, match="cannot be converted"):
        assets.convert(path)


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def test_values_that_python_cannot_write_are_told_without_them():
    assert spec.shown(nested(100_000)) == "a list that is too large to be shown"
    assert spec.shown({"a": 10**5000}) == "a dict that is too large to be shown"


@pytest.mark.parametrize(
    "typed", ["[" * 100_000, "{a: " * 3000, '"\\ud800"', "9" * 5000, "\ud800", "[1, " + "9" * 5000]
)
def test_any_override_is_taken_or_refused(typed: str):
    with pytest.raises(RecipeError):
        recipe.load_recipe("sentiment-lora", [f"train.epochs={typed}"])
    with pytest.raises(LowresError):
        recipe.load_recipe("sentiment-lora", [f"{typed}=1"])


KEYS = st.sampled_from(
    ["task.labels", "model.base", "method.rank", "data", "train.epochs", "method.kind", "task", "x.y"]
)


@settings(deadline=None)
@given(KEYS | st.text(st.characters()), st.text(st.characters()) | st.text("[]{},:'\"-&*! 0e.", max_size=20))
def test_any_text_behind_any_key_is_taken_or_refused(key: str, value: str):
    with contextlib.suppress(RecipeError):
        recipe.load_recipe("sentiment-lora", [f"{key}={value}"])
