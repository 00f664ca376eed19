"""`KEY=VALUE` overrides of a recipe's plain values, before they are validated."""

from collections.abc import Collection, Iterable
from typing import Any

from lowres_ft import yaml12
from lowres_ft.spec import shown


def override(
    values: dict[str, Any], overrides: Iterable[str], found: dict[str, str], plugins: Collection[str]
) -> list[str]:
    """Set the dotted keys in `values`, telling what cannot be set in `found`; return notes on what was dropped.

    `plugins` are the parts whose other keys depend on their kind.
    """
    notes = []
    pairs = []
    for override in overrides:
        key, sign, value = override.partition("=")
        if any("\ud800" <= character <= "\udfff" for character in override):
            found[key] = "is not UTF-8 text"
        elif sign and all(key.split(".")):
            pairs.append((key.split("."), yaml12.scalar(value)))
        else:
            found[override] = "is not KEY=VALUE; for example train.epochs=1"
    # Whole parts come first and kinds next, whatever the order, so that keys below them are kept.
    for path, value in sorted(pairs, key=lambda pair: (len(pair[0]), pair[0][1:] != ["kind"])):
        if len(path) == 2 and path[0] in plugins and path[1] == "kind":
            notes += _change_kind(values, path[0], value, found)
        else:
            _set(values, path, value, found)
    return notes


def _change_kind(values: dict[str, Any], part: str, kind: object, found: dict[str, str]) -> list[str]:
    before = values.get(part)
    if not isinstance(before, dict) or before.get("kind") == kind:
        _set(values, [part, "kind"], kind, found)
        return []
    values[part] = {"kind": kind}
    dropped = ", ".join(f"{key}={shown(value)}" for key, value in before.items() if key != "kind")
    return [f"{part}.kind={kind} starts from that kind's defaults; dropped: {dropped}"] if dropped else []


def _set(values: dict[str, Any], path: list[str], value: object, found: dict[str, str]) -> None:
    *parents, last = path
    place = values
    for depth, part in enumerate(parents, start=1):
        below = place.get(part)
        if below is None:
            below = place[part] = {}
        if not isinstance(below, dict):
            found[".".join(path)] = f"cannot be set: {'.'.join(path[:depth])} has no keys, it is {shown(below)}"
            return
        place = below
    place[last] = value
