"""YAML as recipes use it: the core schema of YAML 1.2, and no key twice.

PyYAML reads YAML 1.1, where `no` is false and `3e-4` is text. Here `no` is a word and `3e-4` a number
(https://yaml.org/spec/1.2.2/#103-core-schema).
"""

import re
from typing import Any

import yaml

from lowres_ft.errors import RecipeError

_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


_DEEPEST = 32  # lists and mappings within each other; recipes need five


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own way; none is inherited)
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse what would bring other types, or the same value by another way."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            problem = "anchors (&) and aliases (*) are not read; write the value out, or quote it if it is text"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        if event.tag is not None:
            problem = f"tags ({event.tag}) are not read; quote the value if it is text"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        if self.depth > _DEEPEST:
            problem = f"lists and mappings are nested too deeply (more than {_DEEPEST})"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' stands here twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        digits = self.construct_scalar(node)
        base = {"0o": 8, "0x": 16}.get(digits[:2], 10)
        try:
            return int(digits[2:] if base != 10 else digits, base)
        except ValueError as error:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(digits)} digits is too long", node.start_mark
            ) from error


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would otherwise read as something else than text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own way; none is inherited)

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Quote what is not printed, for `dumps` to write as escapes: a reader would fold line breaks into spaces."""
        quotes = None if all(map(str.isprintable, text.split("\n"))) else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=quotes)


for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first)
_Dumper.add_representer(str, _Dumper.represent_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def loads(text: str, *, where: str) -> Any:
    """Read one YAML document.

    Raises:
        RecipeError: It is not YAML, a key stands twice, or it holds a tag, an anchor or an alias; the message names
            `where` and the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        told = ", ".join(filter(None, (error.context, error.problem)))
        hint = "Mend the YAML at that line. A text that begins with one of * & ! % @ ` stands in quotes."
        raise RecipeError(f"{where}{line}: {told}", hint=hint) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not YAML: {error}", hint="Save the recipe as UTF-8 text.") from error
    except RecursionError as error:
        raise RecipeError(f"{where}: lists and mappings are nested too deeply") from error


def scalar(text: str) -> Any:
    """Read what stands behind `KEY=`: a flow list or mapping, a quoted text, or one plain scalar.

    Anything that YAML would take apart (a glob, a comment sign, a colon) stays as it was typed.
    """
    plain = text.strip()
    if plain[:1] in ("[", "{", '"', "'"):
        try:
            return yaml.load(plain, Loader=_Loader)  # noqa: S506 (a SafeLoader)
        except (yaml.YAMLError, RecursionError):
            return text
    kind = next((name for name, (pattern, _) in _SCALARS.items() if re.fullmatch(pattern, plain)), None)
    if kind is None:
        return text
    try:
        return _Loader("").construct_object(yaml.ScalarNode(f"tag:yaml.org,2002:{kind}", plain))
    except yaml.YAMLError:
        return text


def dumps(value: object) -> str:
    """Write YAML that `loads` reads back as the same value; mappings keep their order."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return "".join(mark if mark.isprintable() or mark == "\n" else f"\\U{ord(mark):08x}" for mark in text)
