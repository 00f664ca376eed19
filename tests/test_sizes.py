import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowres_ft.sizes import parse_bytes, parse_seconds, show_bytes, show_seconds


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        ("6GiB", 6 * 1024**3),
        ("500 MB", 500_000_000),
        ("1.5KiB", 1536),
        ("7B", 7),
        (" 2TB ", 2 * 1000**4),
        ("9007199254740993B", 2**53 + 1),
    ],
)
def test_sizes_are_read(text, bytes_):
    assert parse_bytes(text) == bytes_


@pytest.mark.parametrize(
    "text",
    [
        *("", "6", "GiB", "6gib", "6 Gib", "6G", "-6GiB", "6e3MB", "1,5GiB", "6GiB free", "0GiB", "0.5B", "٦GiB"),
        *(".5GiB", "9000000TiB", "9" * 400 + "B", "9" * 400 + ".5GiB", "9" * 5000 + "TiB"),
    ],
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="must be"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("5m", 300), ("1.5h", 5400), ("2 d", 172_800), ("5ms", 0.005)]
)
def test_durations_are_read(text, seconds):
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "90", "s", "90S", "1h30m", "-5s", "0s", "inf s", "5 min", "9" * 400 + "h"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="must be"):
        parse_seconds(text)


@given(st.integers(1, 2**50))
def test_a_size_that_is_shown_is_read_again_to_two_figures(count):
    assert parse_bytes(show_bytes(count)) == pytest.approx(count, rel=0.051, abs=1)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (2**20, "1.0 MiB"),
        (6.4 * 2**30, "6.4 GiB"),
        (-3 * 2**30, "-3.0 GiB"),
        (120 * 2**30, "120 GiB"),
    ],
)
def test_sizes_are_shown(count, text):
    assert show_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.52, "0.5 s"), (48, "48 s"), (212, "3.5 min"), (3000, "50 min"), (7560, "2.1 h"), (259_200, "3.0 days")],
)
def test_durations_are_shown(seconds, text):
    assert show_seconds(seconds) == text
