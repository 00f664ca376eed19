"""Recipes: what an experiment is. `load_recipe` reads one, applies overrides and tells every problem at once."""

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from lowres_ft import foreign, registry, yaml12
from lowres_ft.clean import known
from lowres_ft.errors import RecipeError, nearest
from lowres_ft.methods.base import Method
from lowres_ft.overrides import override
from lowres_ft.sizes import parse_bytes, require_rhythm
from lowres_ft.spec import Spec, problems, shown, unknown
from lowres_ft.tasks.base import Task

Share = Annotated[float, Field(gt=0, lt=1)]
ColumnName = Annotated[str, BeforeValidator(lambda name: str(name) if type(name) is int else name)]
"""Text; a whole number is the name of a numbered column, such as those of CoNLL files."""


class ModelSpec(Spec):
    """The pretrained base, and the form in which it is held."""

    base: str = Field(min_length=1)
    """Where the base comes from: `starter:NAME`, a folder, or a Hub id."""
    revision: str | None = None
    """Commit, tag or branch of a Hub base."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Storage of the frozen linear weights: as they are, or bitsandbytes' row-wise int8 or blockwise 4-bit nf4."""
    quantize_embeddings: bool = False
    """Hold the embedding of words, and an output layer that is not new, in int8 too."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype that computes. `auto` leaves it to the plan; a named one is part of the experiment."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout inside the base. It cannot be keyed, so it pins how a step is cut."""

    @field_validator("quantize_embeddings")
    @classmethod
    def _beside_codes(cls, wanted: bool, known: ValidationInfo) -> bool:
        if wanted and known.data.get("quantize") == "none":
            raise ValueError("is for a base in int8 or nf4; set model.quantize")
        return wanted


class DataSpec(Spec):
    """Where the rows come from, and which of them are held out."""

    train: str = Field(min_length=1)
    """`starter:NAME/SPLIT`, `hub:ID@revision/config:split`, a glob, or a file that ends in .csv, .tsv, .jsonl, .json,
    .parquet, .conll, .bio or .iob."""
    validation: Share | str | None = 0.1
    """A share of train, or a source of its own; null for none."""
    test: Share | str | None = 0.1
    """A share of train, or a source of its own; null for none."""
    columns: dict[str, ColumnName] = Field(default={})
    """Which column plays a role, where its name differs: `{text: review, label: stars}`."""
    clean: tuple[Annotated[str, AfterValidator(known)], ...] = ()
    """What is done to every text, in training and in use, in the order given: any of unicode, whitespace, strip_html,
    lowercase, mask_urls and stopwords:LANG."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first N rows of train after the seeded shuffle."""
    distinct: bool = False
    """Use each row once, however often it stands in its source."""
    probe_rows: int = Field(default=8, ge=0, le=256)
    """Validation rows whose token ids and logits lie in the bundle for `verify`; 0, or no validation, for none."""
    report_rows: int = Field(default=8, ge=0, le=30)
    """Held-out rows, the worst and the most in doubt, whose texts the report shows; 0 for none. Never rows of train."""


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
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW; or bitsandbytes', which holds its moments in 8 bits where a tensor has 4,096 weights or more, for GPUs."""
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
    checkpoint_every: Annotated[int | str, AfterValidator(require_rhythm)] = "auto"
    """How often a run saves where it stands: after so many steps (`50`), after some time (`5m`), or `none`, only when a
    signal stops it. `auto` is once a minute, or as seldom as it takes to stay below 1 % of the time."""
    seed: int = Field(default=7, ge=0, lt=2**31)
    """Decides splits, order, initial weights and dropout."""


class BudgetSpec(Spec):
    """What the machine may spend; nothing here changes the result beyond rounding."""

    memory: str | None = None
    """Most that a run may hold, such as `4GiB`; `auto` for what is free, less 5 % of all memory and 512 MiB at least.
    The plan is made more frugal until it fits, or an error tells what would save how much; on Linux and on CUDA the run
    is held to it. Null for no bound."""

    recompute: Literal["auto", "none", "layers", "selective"] = "auto"
    """Compute activations again in the backward pass: of whole layers, for least memory; or but for the products of
    frozen weights, for less time. `auto` leaves it to the plan."""

    offload: Literal["auto", "none", "layers"] = "auto"
    """Let frozen `layers` lie in a file, or beside a GPU, and pass through room for two of them. `auto` leaves it to
    the plan, which does so where nothing else fits into `memory`."""

    probe: bool = True
    """Take the longest micro-batches and a batch of evaluation once before the first step: what does not fit shows
    then, and memory and time are told by what was measured."""

    @field_validator("memory")
    @classmethod
    def _a_size(cls, memory: str | None) -> str | None:
        if memory is not None and memory != "auto":
            parse_bytes(memory)
        return memory


class Title(Spec):
    """What a recipe is called."""

    name: str
    """Letters, digits, `.`, `_` and `-`; results go to `runs/<name>`."""
    summary: str = ""
    """One sentence for `lowres-ft list`."""

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError("must begin with a letter or a digit and hold only letters, digits, '.', '_' and '-'")
        return name


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
