"""Recipes: what an experiment is. `load_recipe` reads one, applies overrides and tells every problem at once."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, ValidationError

from lowres_ft import registry, yaml12
from lowres_ft.errors import RecipeError, nearest
from lowres_ft.methods.base import Method
from lowres_ft.spec import Spec, problems
from lowres_ft.tasks.base import Task

Share = Annotated[float, Field(gt=0, lt=1)]


class ModelSpec(Spec):
    """The pretrained base, and the form in which it is held."""

    base: str = Field(min_length=1)
    """Where the base comes from: `starter:NAME`, a folder, or a Hub id."""
    revision: str | None = None
    """Commit, tag or branch of a Hub base."""
    quantize: Literal["none", "int8"] = "none"
    """Storage of the frozen linear weights: as they are, or bitsandbytes' row-wise int8."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype that computes. `auto` leaves it to the plan; a named one is part of the experiment."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout inside the base. It cannot be keyed, so it pins how a step is cut."""


class DataSpec(Spec):
    """Where the rows come from, and which of them are held out."""

    train: str = Field(min_length=1)
    """`starter:NAME`, a .csv, .tsv, .jsonl or .parquet file, a glob, or `hub:ID@revision/config:split`."""
    validation: Share | str | None = 0.1
    """A share of train, or a source of its own; null for none."""
    test: Share | str | None = 0.1
    """A share of train, or a source of its own; null for none."""
    columns: dict[str, str] = Field(default={})
    """Which column plays a role, where its name differs: `{text: review, label: stars}`."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first N rows of train after the seeded shuffle."""
    probe_rows: int = Field(default=8, ge=0, le=256)
    """Validation rows whose token ids and logits lie in the bundle for `verify`; 0 leaves them out."""


class EarlyStopping(Spec):
    """When to stop before the last step."""

    patience: int = Field(default=2, ge=1)
    """Stop after this many evaluations without a better score."""


class TrainSpec(Spec):
    """The optimizer's steps."""

    epochs: int = Field(default=2, ge=1)
    """Passes over the training rows."""
    steps: int | None = Field(default=None, ge=1)
    """Number of optimizer steps; stands in for epochs when given."""
    batch_size: int = Field(default=32, ge=1)
    """Examples per optimizer step; how a step is cut into micro-batches is the plan's business."""
    learning_rate: float = Field(default=5e-4, gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after warm-up."""
    warmup: float = Field(default=0.06, ge=0, lt=1)
    """Share of all steps over which the rate rises from 0."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decoupled decay, on matrices only."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of a step's gradient; null for no clipping."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations on validation; null for once an epoch."""
    early_stopping: EarlyStopping | None = None
    """Stop when validation no longer improves; null trains to the end. The best step is kept either way."""
    seed: int = Field(default=7, ge=0, lt=2**31)
    """Decides splits, order, initial weights and dropout."""


class Recipe(Spec):
    """One experiment, whole. What only changes how it is computed is not here but in the plan."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Letters, digits, `.`, `_` and `-`; results go to `runs/<name>`."""
    summary: str = ""
    """One sentence for `lowres-ft list`."""
    task: SerializeAsAny[Task]
    model: ModelSpec
    method: SerializeAsAny[Method]
    data: DataSpec
    train: TrainSpec = TrainSpec()
    notes: tuple[str, ...] = Field(default=(), exclude=True)
    """What the loader had to say, for whoever shows it."""

    def to_yaml(self) -> str:
        """The recipe with every default written out; `load_recipe` reads it back to an equal one."""
        return yaml12.dumps(self.model_dump(mode="json"))


_PARTS: dict[str, type[Spec]] = {"model": ModelSpec, "data": DataSpec, "train": TrainSpec}
_PLUGINS: dict[str, registry.Folder] = {"task": "tasks", "method": "methods"}
_TOP = ("name", "summary", "task", "method", *_PARTS)


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
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}", hint="Save the recipe as UTF-8 text.") from error
    found = yaml12.loads(text, where=str(path))
    if not isinstance(found, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of {', '.join(_TOP)}", hint="See `lowres-ft show NAME`.")
    return found


def parse(raw: dict[str, Any], overrides: Sequence[str] = (), *, where: str = "recipe") -> Recipe:
    """Make a recipe from plain values, after applying `overrides` to them."""
    notes = _override(raw, overrides)
    found: dict[str, str] = {}
    parts = dict(_validated(raw, found))
    for key in raw:
        if key not in _TOP:
            found[str(key)] = "is not a key here" + nearest(str(key), _TOP)
    if "method" in parts and "model" in parts:
        conflict = parts["method"].conflict(parts["model"].quantize)
        if conflict:
            found["method.kind"] = conflict
    if "task" in parts and isinstance(columns := dict(raw.get("data") or {}).get("columns"), dict):
        roles = parts["task"].columns
        for role in set(columns) - set(roles):
            found[f"data.columns.{role}"] = f"is no role; the roles are {', '.join(roles)}{nearest(role, roles)}"
    if not found:
        try:
            return Recipe(**parts, notes=tuple(notes))
        except ValidationError as error:
            found |= problems(error, lambda _: _TOP)
    lines = [f"{path}: {sentence}" for path, sentence in sorted(found.items())]
    raise RecipeError("\n  ".join([f"{where}: {len(lines)} problem{'s' * (len(lines) > 1)}", *lines]), hint=_HINT)


_HINT = "`lowres-ft show sentiment-lora` prints a whole recipe; the README explains every key."


def _find(name_or_path: str | Path) -> Path:
    name = str(name_or_path)
    if name in shipped():
        return shipped()[name]
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise RecipeError(f"no recipe file {name}", hint="`lowres-ft list` shows the recipes that are shipped.")
    raise RecipeError(
        f"no recipe '{name}'{nearest(name, shipped())}",
        hint=f"Shipped are {', '.join(shipped())}; a recipe of your own is given by its path, as in ./{name}.yaml.",
    )


def _override(raw: dict[str, Any], overrides: Iterable[str]) -> list[str]:
    """Set the dotted keys in `raw`; return notes on what a change of kind dropped."""
    notes = []
    pairs = []
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise RecipeError(f"'{override}' is not KEY=VALUE", hint="For example train.epochs=1.")
        pairs.append((key.split("."), yaml12.scalar(value)))
    # A change of kind comes first, whatever the order, so that keys for the new kind are kept.
    for path, value in sorted(pairs, key=lambda pair: pair[0][1:] != ["kind"]):
        if len(path) == 2 and path[0] in _PLUGINS and path[1] == "kind":
            notes += _change_kind(raw, path[0], value)
        else:
            _set(raw, path, value)
    return notes


def _change_kind(raw: dict[str, Any], part: str, kind: object) -> list[str]:
    before = raw.get(part)
    if not isinstance(before, dict) or before.get("kind") == kind:
        _set(raw, [part, "kind"], kind)
        return []
    raw[part] = {"kind": kind}
    dropped = ", ".join(f"{key}={value}" for key, value in before.items() if key != "kind")
    return [f"{part}.kind={kind} starts from that kind's defaults; dropped: {dropped}"] if dropped else []


def _set(raw: dict[str, Any], path: list[str], value: object) -> None:
    *parents, last = path
    place = raw
    for depth, part in enumerate(parents, start=1):
        below = place.get(part)
        if below is None:
            below = place[part] = {}
        if not isinstance(below, dict):
            raise RecipeError(f"{'.'.join(path)}: {'.'.join(path[:depth])} has no keys, found {below!r}", hint=_HINT)
        place = below
    place[last] = value


def _validated(raw: Mapping[str, Any], found: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """Yield each part that is valid by its name; write what is wrong with the others into `found`."""
    for key in ("name", "summary"):
        if key in raw:
            yield key, raw[key]
    if "name" not in raw:
        found["name"] = "is missing"
    for key, folder in _PLUGINS.items():
        value = raw.get(key)
        if not isinstance(value, dict) or "kind" not in value:
            found[f"{key}.kind"] = f"is missing; it is one of {', '.join(registry.names(folder))}"
            continue
        try:
            plugin = registry.load(folder, value["kind"])
        except RecipeError as error:
            found[f"{key}.kind"] = error.message
        else:
            yield from _part(key, plugin, value, found)
    for key, spec in _PARTS.items():
        yield from _part(key, spec, raw.get(key, {}), found)


def _part(key: str, spec: type[Spec], value: object, found: dict[str, str]) -> Iterator[tuple[str, Spec]]:
    """Validate one part. JSON mode lets a list be a tuple while numbers and texts stay strictly apart."""
    try:
        yield key, spec.model_validate_json(json.dumps(value))
    except ValidationError as error:
        for path, sentence in problems(error, lambda path: _known(spec, path)).items():
            found[f"{key}.{path}" if path else key] = sentence


def _known(spec: type[Spec], path: tuple[str, ...]) -> Iterable[str]:
    """The field names of `spec` at `path` below it."""
    for part in path:
        annotation = spec.model_fields[part].annotation if part in spec.model_fields else None
        inner = [kind for kind in (annotation, *getattr(annotation, "__args__", ())) if isinstance(kind, type)]
        spec = next((kind for kind in inner if issubclass(kind, Spec)), Spec)
    return spec.model_fields
