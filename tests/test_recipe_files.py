"""Where recipes lie: those that are shipped, and those of the user's own."""

from pathlib import Path

import pytest

from lowres_ft.errors import RecipeError
from lowres_ft.recipe import load_recipe, shipped

# Shipped recipes


def test_the_shipped_recipes_are_the_files_of_the_folder():
    folder = Path(__file__).parent.parent / "recipes"
    assert sorted(shipped()) == sorted(path.stem for path in folder.iterdir())
    assert len(shipped()) == 7


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_is_whole_and_comes_back_the_same(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.summary.endswith(".")
    assert recipe.notes == ()
    (tmp_path / "copy.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(tmp_path / "copy.yaml") == recipe


# Files


def test_a_recipe_lies_anywhere(tmp_path, monkeypatch):
    (tmp_path / "in" / "there").mkdir(parents=True)
    path = tmp_path / "in" / "there" / "mine.yml"
    path.write_bytes(b"\xef\xbb\xbf" + load_recipe("sentiment-lora").to_yaml().replace("\n", "\r\n").encode())
    monkeypatch.chdir(tmp_path)
    for name in (path, str(path), "in/there/mine.yml", Path("in/there/mine.yml"), "./in/there/../there/mine.yml"):
        assert load_recipe(name) == load_recipe("sentiment-lora")


def test_a_shipped_name_wins_over_a_file_that_is_called_so(tmp_path, monkeypatch):
    (tmp_path / "sentiment-lora").write_text("not a recipe")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("sentiment-lora").name == "sentiment-lora"
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        load_recipe(tmp_path / "sentiment-lora")


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("sentiment_lora", "no recipe 'sentiment_lora' (did you mean 'sentiment-lora'?)", "./sentiment_lora.yaml"),
        ("zzz", "no recipe 'zzz'", f"Shipped are {', '.join(shipped())};"),
        ("mine.yaml", "no recipe file mine.yaml", "lowres-ft list"),
        ("there/mine", "no recipe file there/mine", "lowres-ft list"),
        (".", ". is a folder, not a recipe", "lowres-ft list"),
        ("a" * 5000, "a: cannot be read: File name too long", ""),
    ],
)
def test_a_recipe_that_is_not_there(name, message, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert caught.value.message.endswith(message)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "a recipe is a mapping of name, summary, task, method, model, data, train, budget"),
        (b"", "a recipe is a mapping"),
        (b"name: caf\xe9\n", "not UTF-8: 'utf-8' codec can't decode byte 0xe9 in position 9"),
        (b"name: a\nname: b\n", "mine.yaml:2: the key 'name' stands here twice"),
        (b"name: a\n  task: b\n", "mine.yaml:2: mapping values are not allowed here"),
        ("name: a".encode("utf-16"), "not UTF-8"),
        (b"\x00", "not YAML"),
    ],
)
def test_a_file_that_is_no_recipe(content, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.message.startswith(str(path))
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that nobody can read from its start")
def test_a_file_that_cannot_be_read():
    with pytest.raises(RecipeError, match="/proc/self/mem: cannot be read: Input/output error"):
        load_recipe("/proc/self/mem")
