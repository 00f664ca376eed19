"""The base of all configuration, and its errors in plain words."""

from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from lowres_ft.spec import Spec, figures, problems, shown, unknown


class Part(Spec):
    """A part."""

    ratio: Annotated[float, Field(gt=0, lt=1)] | str | None = 0.5
    """A share, or a name."""
    names: Literal["all", "some"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all"


class Whole(Spec):
    """A whole."""

    count: int = Field(ge=1, lt=2**31)
    """How many."""
    rate: float = 0.5
    word: str = Field(default="a", min_length=1)
    flag: bool = False
    part: Part = Part()
    table: dict[str, str] = Field(default={})


def told(text):
    with pytest.raises(ValidationError) as caught:
        Whole.model_validate_json(text)
    return problems(caught.value, lambda path: {(): Whole, ("part",): Part}[path].model_fields)


@pytest.mark.parametrize(
    ("text", "path", "sentence"),
    [
        ('{"count": 0}', "count", "must be at least 1, found 0"),
        ('{"count": 2147483648}', "count", "must be less than 2147483648, found 2147483648"),
        ('{"count": true}', "count", "must be a whole number, found true"),
        ('{"count": 2.0}', "count", "must be a whole number, found 2.0"),
        ('{"count": "2"}', "count", "must be a whole number, found '2'"),
        ("{}", "count", "is missing"),
        ('{"count": 1, "rate": "fast"}', "rate", "must be a number, found 'fast'"),
        ('{"count": 1, "rate": false}', "rate", "must be a number, found false"),
        ('{"count": 1, "rate": NaN}', "rate", "must be a finite number, found NaN"),
        ('{"count": 1, "rate": -Infinity}', "rate", "must be a finite number, found -Infinity"),
        ('{"count": 1, "word": 3}', "word", "must be text, found 3"),
        ('{"count": 1, "word": ""}', "word", "must be non-empty, found ''"),
        ('{"count": 1, "flag": 1}', "flag", "must be true or false, found 1"),
        ('{"count": 1, "part": null}', "part", "must be a mapping, found null"),
        ('{"count": 1, "table": [1]}', "table", "must be a mapping, found [1]"),
        ('{"count": 1, "table": {"a": 1}}', "table.a", "must be text, found 1"),
        ('{"count": 1, "part": {"ratio": 2}}', "part.ratio", "must be less than 1 or text, found 2"),
        ('{"count": 1, "part": {"names": 2}}', "part.names", "must be 'all' or 'some' or a list, found 2"),
        ('{"count": 1, "part": {"names": []}}', "part.names", "must be 'all' or 'some' or non-empty, found []"),
        ('{"count": 1, "wrd": "a"}', "wrd", "is not a key here (did you mean 'word'?)"),
        ('{"count": 1, "part": {"x": 1}}', "part.x", "is not a key here; there are ratio, names"),
        ('{"count": 1, "word": "\\ud800"}', "", "holds text that is not Unicode"),
    ],
)
def test_each_problem_is_one_sentence(text, path, sentence):
    assert told(text) == {path: sentence}


def test_all_problems_are_told_at_once():
    assert set(told('{"rate": "a", "x": 1, "part": {"ratio": [], "y": 1}}')) == {
        *("count", "rate", "x", "part.ratio", "part.y")
    }


def test_a_spec_is_frozen_and_checked_in_python_too():
    whole = Whole(count=1)
    with pytest.raises(ValidationError, match="frozen"):
        whole.count = 2
    with pytest.raises(ValidationError, match="valid integer"):
        Whole(count="1")


def test_defaults_are_checked():
    class Wrong(Spec):
        count: int = Field(default=0, ge=1)

    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Wrong()


def test_docstrings_of_attributes_are_their_help():
    assert Whole.model_fields["count"].description == "How many."


def test_values_are_shown_as_a_recipe_writes_them():
    assert [shown(value) for value in (True, None, "é", [1, "é"])] == ["true", "null", "'é'", '[1, "é"]']
    assert len(shown(["abc"] * 100)) == 80
    assert shown("x" * 100).endswith("xxx ...")


@pytest.mark.parametrize(
    ("values", "sign", "shown"),
    [
        ((0.8514, 0.0, 1.0), "", ["0.851", "0.000", "1.000"]),
        ((0.0041, -0.0123, 0.02), "+", ["+0.004", "-0.012", "+0.020"]),
        ((0.00012345, 0.0, 0.0004), "", ["0.0001234", "0", "0.0004"]),
        ((7038187349.3, 4e9, 1.1e10), "", ["7.038e+09", "4e+09", "1.1e+10"]),
        ((0.0,), "", ["0.000"]),
    ],
)
def test_scores_of_any_size_can_be_read(values, sign, shown):
    assert figures(*values, sign=sign) == shown


def test_unknown_names_the_nearest_or_else_all():
    assert unknown("rnk", ["rank", "alpha"]) == "is not a key here (did you mean 'rank'?)"
    assert unknown("zzz", iter(["rank"])) == "is not a key here; there is rank"
