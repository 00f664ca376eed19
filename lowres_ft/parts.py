"""The parts of a recipe that are no plugins: base, data, training, budget, and what it is called."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from lowres_ft.clean import known
from lowres_ft.sizes import parse_bytes, require_rhythm
from lowres_ft.spec import Spec

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
    """Take the longest micro-batches, a batch of evaluation and some steps before the first one: what does not fit
    shows then, and memory and time are told by what was measured too."""

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
