"""YAML as recipes use it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowres_ft import yaml12
from lowres_ft.errors import RecipeError

SCALARS = {
    "3e-4": 3e-4,
    "1.": 1.0,
    ".5": 0.5,
    "-.5E+2": -50.0,
    "+7": 7,
    "007": 7,
    "0o17": 15,
    "0x1F": 31,
    "-.inf": -math.inf,
    "true": True,
    "FALSE": False,
    "null": None,
    "~": None,
    # Words here, although YAML 1.1 reads them as something else.
    "no": "no",
    "On": "On",
    "y": "y",
    "1_000": "1_000",
    "017_": "017_",
    "0b11": "0b11",
    "-0x1F": "-0x1F",
    "1:30": "1:30",
    "2024-05-01": "2024-05-01",
    "2024-05-01 10:00:00": "2024-05-01 10:00:00",
    "tRue": "tRue",
    "1e": "1e",
    ".": ".",
    "=": "=",
    "<<": "<<",
    "1e3x": "1e3x",
}
LABELS = [
    "no",
    "1e3",
    "null",
    "007",
    "~",
    "",
    " x ",
    "a\nb",
    "a\n",
    "\x85",
    "a\r\n",
    "\u2028b",
    "\ufeff",
    "é",
    "差评",
    "🙂",
    "#",
    "a: b",
    "- a",
    "yes",
    "0x1",
]
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1, max_size=8), inner, max_size=4),
    max_leaves=12,
)


def loads(text):
    return yaml12.loads(text, where="mine.yaml")


@pytest.mark.parametrize(("text", "value"), SCALARS.items())
def test_scalars_follow_the_core_schema(text, value):
    for found in (loads(f"key: {text}")["key"], yaml12.scalar(text)):
        assert (type(found), found) == (type(value), value)


def test_not_a_number_is_a_float():
    assert math.isnan(loads("key: .nan")["key"])
    assert math.isnan(yaml12.scalar(".NaN"))


@pytest.mark.parametrize("label", LABELS)
def test_words_stay_words(label):
    assert loads(yaml12.dumps({"labels": [label], label: 1})) == {"labels": [label], label: 1}


@given(TREES)
def test_what_is_written_is_read_back(value):
    found = loads(yaml12.dumps({"key": value}))["key"]
    assert repr(found) == repr(value)  # 1 is not 1.0 or True


def test_mappings_keep_their_order():
    assert list(loads(yaml12.dumps({"b": 1, "a": 2}))) == ["b", "a"]


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", 5, "'c' stands here twice"),
        ("a: 1\n'a': 1\n", 2, "'a' stands here twice"),
        ("a: {b: 1,\n b: 1}\n", 2, "'b' stands here twice"),
        ("a: 1\n[b]: 2\n", 2, "a key must be a word"),
        ("a: 1\nb\n", 3, "could not find expected ':'"),
        ("a: b: c\n", 1, "mapping values are not allowed here"),
        ("a:\n\tb: 1\n", 2, "cannot start any token"),
        ("a: &x 1\nb: *x\n", 1, "anchors (&) and aliases (*) are not read"),
        ("a: 1\nb: *.csv\n", 2, "while scanning an alias"),
        ("a: !!timestamp 2024-05-01\n", 1, "tags (tag:yaml.org,2002:timestamp) are not read"),
        ("a: 1\nb: !!python/name:os.system x\n", 2, "are not read"),
        (f"a: 1\nb: {'9' * 5000}\n", 2, "a number of 5000 digits is too long"),
        ("a: *x\n", 1, "anchors (&) and aliases (*) are not read"),
        ("a: 1\n---\nb: 1\n", 2, "expected a single document"),
    ],
)
def test_what_is_not_read_is_told_with_its_line(text, line, told):
    with pytest.raises(RecipeError) as caught:
        loads(text)
    assert caught.value.message.startswith(f"mine.yaml:{line}: ")
    assert told in caught.value.message


@pytest.mark.parametrize(("text", "told"), [("a: \x00", "not YAML"), ("a: " + "[" * 3000, "nested too deeply")])
def test_what_has_no_line_is_told_all_the_same(text, told):
    with pytest.raises(RecipeError, match=told):
        loads(text)


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("[a, 'no', 3]", ["a", "no", 3]),
        ("{text: review, label: stars}", {"text": "review", "label": "stars"}),
        ("'3'", "3"),
        ('"a\\nb"', "a\nb"),
        (" 3 ", 3),
        ("", None),
    ],
)
def test_values_on_the_command_line(typed, value):
    assert yaml12.scalar(typed) == value


@pytest.mark.parametrize(
    "typed",
    [
        *("*.csv", "**/[ab]*.csv", "[ab]*.csv", "[!a].csv", "{a,b}.csv", "a#b.csv", "a #b.csv", "C:\\x", "&x", "!x"),
        *(
            "hub:a/b@c/d:e",
            "a: b",
            "- a",
            "it's",
            "'a",
            "[a",
            "[*a]",
            "%",
            "@",
            "`",
            "|",
            "~/x.csv",
            "x.csv ",
            "9" * 5000,
        ),
    ],
)
def test_what_yaml_would_take_apart_stays_as_typed(typed):
    assert yaml12.scalar(typed) == typed
