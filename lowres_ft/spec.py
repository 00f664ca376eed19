"""The base of everything that a user configures, and its validation errors in plain words."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lowres_ft.errors import nearest


class Spec(BaseModel):
    """Frozen configuration: unknown keys are refused, and each field's docstring is its help."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


_BOUND = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
_KIND = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "finite_number": "a finite number",
}
_LONGEST_SHOWN = 80  # characters of a value
_UNION_TAGS = ("constrained-", "function-", "list[", "tuple[", "dict[", "literal[")


def problems(error: ValidationError, known: Callable[[tuple[str, ...]], Iterable[str]]) -> dict[str, str]:
    """Return one sentence for each wrong key of `error`, by its dotted path.

    `known` gives the names that are allowed at a path; it is asked for the nearest one to an unknown key.
    Alternatives of a union that all failed become one sentence: "must be a number or text".
    """
    wanted: dict[str, list[str]] = {}
    found: dict[str, Any] = {}
    for item in error.errors(include_url=False):
        path = _path(item["loc"])
        dotted = ".".join(path)
        wanted.setdefault(dotted, [])
        found[dotted] = item["input"]
        sentence = _wanted(item["type"], item.get("ctx", {}), item["msg"])
        if item["type"] == "extra_forbidden":
            sentence = unknown(path[-1], known(path[:-1]))
        if sentence not in wanted[dotted]:
            wanted[dotted].append(sentence)
    # Where an alternative of a union went deeper, the others, which are no mapping at all, were not meant.
    deepest = [path for path in wanted if not any(other.startswith(f"{path}.") for other in wanted)]
    return {path: _sentence(wanted[path], found[path]) for path in deepest}


def _path(location: tuple[int | str, ...]) -> tuple[str, ...]:
    """Drop the parts of a pydantic location that name a union's alternative."""
    types = {"int", "float", "str", "bool"}
    parts = [str(part) for part in location]
    return tuple(p for i, p in enumerate(parts) if i == 0 or not (p in types or p.startswith(_UNION_TAGS)))


def _wanted(kind: str, context: Mapping[str, Any], message: str) -> str:
    if kind in _KIND:
        return f"must be {_KIND[kind]}"
    for name, words in _BOUND.items():
        if name in context:
            bound = context[name]
            return f"must be {words} {bound:g}" if isinstance(bound, float) else f"must be {words} {bound}"
    match kind:
        case "literal_error":
            return f"must be {context['expected']!s}"
        case "missing":
            return "is missing"
        case "string_too_short" | "too_short" if context["min_length"] == 1:
            return "must be non-empty"
        case "json_invalid":
            return "holds text that is not Unicode"
    return message.removeprefix("Value error, ")


def unknown(name: str, known: Iterable[str]) -> str:
    """What to say of a key that does not exist: the one that was meant, else all of them."""
    known = list(known)
    return "is not a key here" + (nearest(name, known) or f"; there {'are' if known[1:] else 'is'} {', '.join(known)}")


def shown(value: object) -> str:
    """A value as a recipe would write it, cut where it is long."""
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except (RecursionError, ValueError):  # nested too deeply, or a number too long to be written
        text = f"a {type(value).__name__} that is too large to be shown"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 4]} ..."


def figures(*values: float, sign: str = "") -> list[str]:
    """Scores side by side, in three decimals; in four digits where those would say nothing, or too much."""
    largest = max(abs(value) for value in values)
    form = f"{sign}.3f" if largest == 0 or 1e-3 <= largest < 1e5 else f"{sign}.4g"
    return [format(value, form) for value in values]


def _sentence(parts: list[str], found: object) -> str:
    """Join the alternatives; a key that is unknown or missing has no value worth showing."""
    if parts[0].startswith(("is ", "holds ")):
        return parts[0]
    first, *rest = parts
    words = " or ".join([first, *(part.removeprefix("must be ") for part in rest)])
    return f"{words}, found {shown(found)}"
