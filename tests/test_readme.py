"""The README says what the code does: its recipe reference, its map, its Python."""

import re
from collections.abc import Iterator
from pathlib import Path

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lowres_ft import recipe, registry
from lowres_ft.spec import Spec

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    value = list(value) if isinstance(value, tuple) else value
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def reference() -> str:
    """A table of every key of a recipe, from the fields' own docstrings."""
    parts = {"": {key: recipe.Recipe.model_fields[key] for key in ("name", "summary")}}
    parts |= {f"{part}.": spec.model_fields for part, spec in recipe._PARTS.items()}
    for part, folder in recipe._PLUGINS.items():
        for name in registry.names(folder):
            fields = registry.load(folder, name).model_fields
            parts[f"{part}."] = parts.get(f"{part}.", {})
            parts[f"{part} {name}: "] = {key: field for key, field in fields.items() if key != "kind"}
    lines = ["| key | default | what it is |", "|---|---|---|"]
    lines += [line for prefix, fields in parts.items() for line in table(prefix, fields)]
    return "\n".join(lines)


def table(prefix: str, fields: dict[str, FieldInfo]) -> Iterator[str]:
    """A line for each field, and for each field of a part inside it."""
    for key, field in fields.items():
        told = (field.description or "").replace("\n", " ").replace("|", "\\|")
        yield f"| {prefix}{key} | {default(field)} | {told} |"
        for inner in getattr(field.annotation, "__args__", ()):
            if isinstance(inner, type) and issubclass(inner, Spec):
                yield from table(f"{prefix}{key}.", inner.model_fields)


def test_the_recipe_reference_is_up_to_date():
    """`python -m tests.test_readme` prints what must stand there."""
    assert reference() in README


def test_the_map_names_every_file():
    files = {path.name for path in (ROOT / "lowres_ft").glob("*.py") if not path.name.startswith("__")}
    assert files == set(re.findall(r"^ {4}(\w+\.py) +L\d", README, re.MULTILINE))


def test_the_python_example_is_python():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    compile(code, "README.md", "exec")
    assert len(code.splitlines()) <= 10


if __name__ == "__main__":
    print(reference())
