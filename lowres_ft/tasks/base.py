"""What a task is: how a row becomes tokens, what its loss counts, and how it is scored."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from lowres_ft.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100
"""A target that counts for nothing: not in the loss, not among the items that it is divided by."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row as the task sees it. `where` is its file and line."""

    where: str
    text: str
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """One token sequence: its ids, and its targets (one for the sequence, or one a token)."""

    ids: list[int]
    targets: list[int]


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch, padded on the right."""

    ids: "Tensor"
    """(B, T) token ids."""
    mask: "Tensor"
    """(B, T) 1 for a token, 0 for padding."""
    targets: "Tensor"
    """(B,) or (B, T) class indices, `IGNORED` where nothing is supervised."""
    rows: "Tensor"
    """(B,) positions of the sequences in their split; they key the adapter's dropout."""


@dataclass(frozen=True)
class Seen:
    """How often a label stands in a split, and where first."""

    count: int
    where: str


class Task(Spec):
    """A task. Its fields are its part of the recipe."""

    kind: str
    """Name of the task's file."""
    max_length: int = Field(default=128, ge=4)
    """Tokens after which a text is cut; memory grows with it."""

    columns: ClassVar[Mapping[str, str]]
    """Roles of the columns that the task reads, and their Arrow types."""
    model_class: ClassVar[str]
    """The auto class of transformers that makes the model."""
    peft_type: ClassVar[str]
    """PEFT's name for the task."""
    metric: ClassVar[str]
    """The score that early stopping follows; greater is better."""
    baseline_rows: ClassVar[int]
    """Training rows that the baselines see at the most."""

    def model_config_fields(self) -> dict[str, Any]:
        """What the model's config must say about this task, such as its labels."""
        raise NotImplementedError

    def read(self, row: Mapping[str, Any], where: str) -> Example:
        """Make an example of a row whose columns are named by their roles.

        Raises:
            DataError: The row cannot be one; the message names `where`.
        """
        raise NotImplementedError

    def resolve(self, seen: Mapping[str, Seen]) -> Self:
        """Return the task with its labels known, given the labels that stand in the training rows.

        Raises:
            DataError: The labels are not what the recipe says, or no task can be made of them.
        """
        raise NotImplementedError

    def check(self, seen: Mapping[str, Seen]) -> None:
        """Compare the labels of a held-out split with the task's.

        Raises:
            DataError: Some are unknown; the message lists them with file and line.
        """
        raise NotImplementedError

    def class_of(self, label: str) -> int:
        """The index of a row's label, by which a split is stratified.

        Raises:
            KeyError: The label is none of the task's.
        """
        raise NotImplementedError

    def encode(self, tokenizer: "PreTrainedTokenizerBase", examples: Sequence[Example]) -> list[Encoded]:
        """Tokenize examples; an example without a label gets `IGNORED` targets."""
        raise NotImplementedError

    def loss(self, model: "PreTrainedModel", batch: Batch) -> "Tensor":
        """Sum (not mean) of the loss over the supervised items of a batch, in fp32."""
        raise NotImplementedError

    def outputs(self, model: "PreTrainedModel", batch: Batch) -> "Tensor":
        """(B, ...) fp32 scores of a batch, from which predictions are made."""
        raise NotImplementedError

    def evidence(self, targets: "np.ndarray", outputs: "np.ndarray") -> "np.ndarray":
        """(N, ...) what each row contributes to the scores; computed once, and resampled by a bootstrap."""
        raise NotImplementedError

    def metrics(self, evidence: "np.ndarray") -> dict[str, float]:
        """Scores by name; called again for every resample of the evidence's rows."""
        raise NotImplementedError

    def details(self, evidence: "np.ndarray") -> dict[str, Any]:
        """What a report shows beside the metrics, such as a confusion matrix."""
        raise NotImplementedError

    def baselines(self, train: Iterable[Example], test: Iterable[Example], seed: int) -> "dict[str, np.ndarray]":
        """Outputs on `test` of simple models made from `train`, by name."""
        raise NotImplementedError

    def prediction(self, example: Example, output: "np.ndarray") -> dict[str, Any]:
        """One line of `lowres-ft predict --json`."""
        raise NotImplementedError


PLUGIN = Task
