"""Sizes and durations as people write them: "6GiB" is bytes, "90s" is seconds."""

import re

_SIZES = {
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("kMGT", 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}
_DURATIONS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_MOST = 2**62  # bytes or seconds; systems count in 64 bits
_WRITTEN = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]+)", re.ASCII)


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "6GiB" (1024^3) or "500 MB" (1000^2); a part of a byte is left out.

    Raises:
        ValueError: It has no unit, an unknown one, or no whole byte, or is more than can be counted.
    """
    found = int(_parsed(text, _SIZES, "a size such as 6GiB or 500MB"))
    if found < 1:
        raise ValueError("must be at least one byte")
    return found


def parse_seconds(text: str) -> float:
    """Seconds of a duration such as "90s", "5m" or "1.5h".

    Raises:
        ValueError: It has no unit, an unknown one, is zero, or is more than can be counted.
    """
    found = _parsed(text, _DURATIONS, "a duration such as 90s, 5m or 1.5h")
    if found <= 0:
        raise ValueError("must be longer than nothing")
    return found


def require_rhythm(every: int | str) -> int | str:
    """See that something is to be done every so many steps, or after such a duration; `auto`, `none` and `off` pass.

    Raises:
        ValueError: It is none of these.
    """
    try:
        if isinstance(every, int) and every < 1:
            raise ValueError
        if isinstance(every, str) and every not in ("auto", "none", "off"):
            parse_seconds(every)
    except ValueError:
        raise ValueError("must be a number of steps, a duration such as 5m, auto or none") from None
    return every


def _parsed(text: str, units: dict[str, float] | dict[str, int], wanted: str) -> float:
    match = _WRITTEN.fullmatch(text.strip())
    if match is None or match[2] not in units:
        raise ValueError(f"must be {wanted}, in one of {', '.join(units)}")
    whole = match[1].isdecimal()  # kept an integer, which floats hold exactly up to 2^53 only
    short = len(match[1].partition(".")[0].lstrip("0")) < len(str(_MOST))
    found = (int(match[1]) if whole else float(match[1])) * units[match[2]] if short else _MOST
    if found >= _MOST:
        raise ValueError("must be smaller, by far")
    return found


def show_bytes(count: float) -> str:
    """Bytes in the largest unit of 1024 of which there is one: "6.4 GiB"; a debt keeps its sign."""
    size = abs(count)
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size >= _SIZES[unit]:
            value = count / _SIZES[unit]
            whole = abs(value) >= (100 if unit in ("TiB", "GiB") else 10)
            return f"{value:.0f} {unit}" if whole else f"{value:.1f} {unit}"
    return f"{count:.0f} B"


def show_seconds(seconds: float) -> str:
    """A duration in two figures that people read: "48 s", "3.5 min", "2.1 h", "3.0 days"."""
    for limit, size, unit in ((90, 1.0, "s"), (5400, 60.0, "min"), (172_800, 3600.0, "h")):
        if seconds < limit:
            value = seconds / size
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"
