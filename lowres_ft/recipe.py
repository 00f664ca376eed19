"""Recipes: what an experiment is. `load_recipe` reads one, applies overrides and tells every problem at once."""

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, SerializeAsAny, ValidationError

from lowres_ft import foreign, registry, yaml12
from lowres_ft.errors import RecipeError, nearest
from lowres_ft.methods.base import Method
from lowres_ft.overrides import override
from lowres_ft.parts import BudgetSpec, DataSpec, ModelSpec, Title, TrainSpec
from lowres_ft.spec import Spec, problems, shown, unknown
from lowres_ft.tasks.base import Task


class Recipe(Title):
    """One experiment, whole. What only changes how it is computed is not here but in the plan."""

    task: SerializeAsAny[Task]
    model: ModelSpec
    method: SerializeAsAny[Method]
    data: DataSpec
    train: TrainSpec = TrainSpec()
    budget: BudgetSpec = BudgetSpec()
    notes: tuple[str, ...] = Field(default=(), exclude=True)
    """What the loader had to say, for whoever shows it."""

    def to_yaml(self) -> str:
        """The recipe with every default written out; `load_recipe` reads it back to an equal one."""
        return yaml12.dumps(self.model_dump(mode="json"))


_PARTS: dict[str, type[Spec]] = {"model": ModelSpec, "data": DataSpec, "train": TrainSpec, "budget": BudgetSpec}
_PLUGINS: dict[str, registry.Folder] = {"task": "tasks", "method": "methods"}
_TOP = (*Title.model_fields, *_PLUGINS, *_PARTS)


def shipped() -> dict[str, Path]:
    """The recipes that come with lowres-ft, by name: in the package when installed, beside it in a checkout."""
    package = Path(__file__).parent
    folder = next(path for path in (package / "recipes", package.parent / "recipes") if path.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by name, or one of the user's by path, and apply `KEY=VALUE` overrides.

    Raises:
        RecipeError: The recipe is not found or not valid; the message lists every problem by its path.
    """
    return parse(raw(name_or_path), overrides, where=str(_find(name_or_path)))


def raw(name_or_path: str | Path) -> dict[str, Any]:
    """The plain values of a recipe file, before they are validated."""
    path = _find(name_or_path)
    try:
        text = foreign.read_bytes(path, _LARGEST, RecipeError).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8: {error}", hint="Save the recipe as UTF-8 text.") from error
    found = yaml12.loads(text, where=str(path))
    if not isinstance(found, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of {', '.join(_TOP)}", hint="See `lowres-ft show NAME`.")
    return found


def parse(raw: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "recipe") -> Recipe:
    """Make a recipe from plain values, with `overrides` applied to them.

    Raises:
        RecipeError: They are not valid; the message names `where` and lists every problem by its path.
    """
    values = copy.deepcopy(dict(raw))
    found: dict[str, str] = {}
    notes = override(values, overrides, found, tuple(_PLUGINS))
    parts = dict(_validated(values, found))
    for key in values:
        if key not in _TOP:
            found[str(key)] = unknown(str(key), _TOP)
    found |= _disagreements(values, parts)
    for path in [path for path in found if _misspelled(path, found)]:
        del found[path]
    if not found:
        return Recipe(**parts, notes=tuple(notes))
    lines = [f"{path}: {sentence}" for path, sentence in sorted(found.items())]
    raise RecipeError("\n  ".join([f"{where}: {len(lines)} problem{'s' * (len(lines) > 1)}", *lines]), hint=_HINT)


def _disagreements(values: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong between parts that are right by themselves."""
    found = {}
    if "method" in parts and "model" in parts:
        conflict = parts["method"].conflict(parts["model"].quantize)
        if conflict:
            found["method.kind"] = conflict
    if "method" in parts and "task" in parts and parts["method"].head_only and not parts["task"].new_head:
        found["method.kind"] = (
            f"{parts['method'].kind} trains the task's head alone, and {parts['task'].kind} has none; use lora"
        )
    if "train" in parts and "data" in parts and parts["data"].validation is None:
        for key in ("early_stopping", "evaluate_every"):
            if getattr(parts["train"], key) is not None:
                found[f"train.{key}"] = "needs rows to evaluate on, but data.validation is null"
    if "task" in parts and "data" in parts and parts["task"].spans_refer_to_text and parts["data"].clean:
        found["data.clean"] = (
            f"names {', '.join(parts['data'].clean)}, which may move characters, but {parts['task'].kind} answers with "
            "places in the text as given; use []"
        )
    data = values.get("data")
    columns = data.get("columns") if isinstance(data, dict) else None
    if "task" in parts and isinstance(columns, dict):
        roles = list(dict.fromkeys(role for form in parts["task"].forms for role in form.roles))
        for role in map(str, columns):
            if role not in roles:
                found[f"data.columns.{role}"] = f"is no role; the roles are {', '.join(roles)}{nearest(role, roles)}"
    return found


def _misspelled(path: str, found: Mapping[str, str]) -> bool:
    """Whether a missing key stands there under a wrong name, which is told already."""
    if not found[path].startswith("is missing"):
        return False
    parts = path.split(".")
    strangers = [other.rpartition(".") for other, sentence in found.items() if sentence.startswith("is not a key")]
    return any(
        nearest(name, [part])
        for depth, part in enumerate(parts)
        for parent, _, name in strangers
        if parent == ".".join(parts[:depth])
    )


_LARGEST = 1 << 20  # bytes of a recipe's file
_HINT = "`lowres-ft show sentiment-lora` prints a whole recipe; the README explains every key."


def _find(name_or_path: str | Path) -> Path:
    name = str(name_or_path)
    if name in shipped():
        return shipped()[name]
    path = Path(name_or_path)
    try:
        if path.is_file():
            return path
        folder = path.is_dir()
    except OSError as error:
        raise RecipeError(f"{name}: cannot be read: {error.strerror}") from error
    if folder or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise RecipeError(
            f"{name} is a folder, not a recipe" if folder else f"no recipe file {name}",
            hint="`lowres-ft list` shows the recipes that are shipped.",
        )
    raise RecipeError(
        f"no recipe '{name}'{nearest(name, shipped())}",
        hint=f"Shipped are {', '.join(shipped())}; a recipe of your own is given by its path, as in ./{name}.yaml.",
    )


def _validated(values: Mapping[str, Any], found: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """Yield each part that is valid by its name; write what is wrong with the others into `found`."""
    for _, title in _part("", Title, {key: values[key] for key in Title.model_fields if key in values}, found):
        yield from title
    for key, folder in _PLUGINS.items():
        plugin = _plugin(key, folder, values.get(key), found)
        if plugin:
            yield from _part(key, plugin, values[key], found)
    for key, spec in _PARTS.items():
        yield from _part(key, spec, values.get(key, {}), found)


def _plugin(key: str, folder: registry.Folder, value: object, found: dict[str, str]) -> type[Spec] | None:
    """The class that a part's kind names."""
    kinds = ", ".join(registry.names(folder))
    if value is not None and not isinstance(value, dict):
        found[key] = f"must be a mapping with a kind ({kinds}), found {shown(value)}"
    elif not value or "kind" not in value:
        found[f"{key}.kind"] = f"is missing; it is one of {kinds}"
        for name in map(str, value or ()):
            if nearest(name, ["kind"]):
                found[f"{key}.{name}"] = unknown(name, ["kind"])
    else:
        try:
            return registry.load(folder, value["kind"])
        except RecipeError as error:
            found[f"{key}.kind"] = error.message
    return None


def _part(key: str, spec: type[Spec], value: object, found: dict[str, str]) -> Iterator[tuple[str, Spec]]:
    """Validate one part. JSON mode lets a list be a tuple while numbers and texts stay strictly apart."""
    try:
        yield key, spec.model_validate_json(json.dumps(value))
    except ValidationError as error:
        for path, sentence in problems(error, lambda path: _known(spec, path)).items():
            found[".".join(filter(None, (key, path)))] = sentence


def _known(spec: type[Spec], path: tuple[str, ...]) -> Iterable[str]:
    """The field names of `spec` at `path` below it."""
    for part in path:
        annotation = spec.model_fields[part].annotation if part in spec.model_fields else None
        inner = [kind for kind in (annotation, *getattr(annotation, "__args__", ())) if isinstance(kind, type)]
        spec = next((kind for kind in inner if issubclass(kind, Spec)), Spec)
    return spec.model_fields
