"""What a task is: how a row becomes tokens, what its loss counts, and how it is scored.

A row gives one or more token sequences (a long text: several windows). A sequence has targets, one for the whole or
one for each token; those that are not `IGNORED` are its items. An item is what the loss counts and what is scored.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from lowres_ft.errors import DataError
from lowres_ft.spec import Spec
from lowres_ft.tasks._ragged import Ragged as Ragged

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100
"""A target that counts for nothing: not in the loss, not among the items that it is divided by; of floats it is NaN."""

NONE = "(none)"
"""What is shown where a row has no label or no entity."""


def supervised(targets: "np.ndarray") -> "np.ndarray":
    """Which targets are items: all but `IGNORED`, of floats all but NaN."""
    found: np.ndarray = targets != IGNORED if targets.dtype.kind == "i" else targets == targets
    return found


@dataclass(frozen=True, slots=True)
class Example:
    """One row as a task sees it; each task adds its own fields, of plain JSON values."""

    where: str
    """File and line."""


@dataclass(frozen=True)
class Form:
    """One way in which a row's columns can hold an example, by their roles."""

    given: tuple[str, ...]
    """What is read."""
    wanted: tuple[str, ...] = ()
    """What is to be predicted; absent where texts without labels are read."""
    optional: tuple[str, ...] = ()
    hint: str = ""
    """What else may be meant where a column is missing."""

    @property
    def roles(self) -> tuple[str, ...]:
        """All roles of the form."""
        return (*self.given, *self.wanted, *self.optional)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One token sequence: its ids, and its targets (for the whole, or one a token)."""

    ids: list[int]
    targets: list[int] | list[float]
    """Class indices, or floats in every sequence of a task: which they are is kept, and told by the first."""
    segments: list[int] | None = None
    """Which of two texts each token is of (0, 1); None where there is but one."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch, padded on the right."""

    ids: "Tensor"
    """(B, T) token ids."""
    mask: "Tensor"
    """(B, T) 1 for a token, 0 for padding."""
    targets: "Tensor"
    """(B, D) class indices or floats, `IGNORED` (NaN) where there is no item; D is T where each token has a target."""
    rows: "Tensor"
    """(B,) positions of the sequences in their split, packed (B, T) of each token's; they key the adapter's dropout."""
    segments: "Tensor | None" = None
    """(B, T) which of two texts each token is of, for models that are told."""
    places: "Tensor | None" = None
    """(B, T) each token's place in its sequence, where several are packed into a row."""


@dataclass(frozen=True)
class Seen:
    """How often a label stands in a split, and where first."""

    count: int
    where: str


class Task(Spec):
    """A task: its fields are its part of the recipe, the examples that its methods get those that its `read` made."""

    kind: str
    """Name of the task's file."""
    max_length: int = Field(default=128, ge=4)
    """Tokens after which a text is cut; memory grows with it."""

    example: ClassVar[type[Example]]
    """The class of its examples."""
    model_class: ClassVar[str]
    """The auto class of transformers that makes the model."""
    peft_type: ClassVar[str]
    """PEFT's name for the task."""
    hub_tag: ClassVar[str]
    """The Hub's name for the task."""
    new_head: ClassVar[bool] = True
    """True where the modules outside the base are made anew, trained and saved; False where the base brings them."""
    generates: ClassVar[bool] = False
    """True where the answer is a text that the model writes."""
    higher_is_better: ClassVar[bool] = True
    """Whether a greater `metric` is a better one."""
    spans_refer_to_text: ClassVar[bool] = False
    """True where an answer holds places in the text as given, so that nothing may move its characters."""
    packs: ClassVar[bool] = False
    """True where each token has a target of its own and sees no later one, so that a row can hold several sequences."""
    base_is_baseline: ClassVar[bool] = False
    """True where the untouched base can do the task, so that its scores before training are a baseline."""
    baseline_rows: ClassVar[int] = 100_000
    """Training rows that the baselines see at the most."""

    @property
    def in_every_part(self) -> bool:
        """True where a label with too few rows to stand in every split is an error."""
        return True

    @property
    def metric(self) -> str:
        """The score that early stopping follows: the first of `metrics`."""
        raise NotImplementedError

    @property
    def metric_noise(self) -> float:
        """How much `metric`, in its own unit, may move by rounding alone; 0 where it counts answers."""
        return 0.0

    @property
    def forms(self) -> tuple[Form, ...]:
        """The ways in which columns can hold an example; the first that a row fits is taken."""
        raise NotImplementedError

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the model's outputs by index, once they are known; none where outputs have no names."""
        return ()

    @property
    def trial(self) -> str:
        """What follows `lowres-ft predict BUNDLE` to try it."""
        return '"your text"'

    @property
    def advice(self) -> str:
        """What other programs that load the model must know; empty where there is nothing."""
        return ""

    def model_config_fields(self) -> dict[str, Any]:
        """What the model's config must say about this task, such as its labels."""
        return {}

    def read(self, row: Mapping[str, Any], where: str) -> Any:
        """Make an example of a row whose columns are named by the roles of one of the `forms`.

        Raises:
            DataError: The row cannot be one; the message names `where`.
        """
        raise NotImplementedError

    def question(self, row: Mapping[str, Any], where: str) -> Any:
        """Make an example to predict on, of a row without what is wanted; a DataError where it cannot be one."""
        return self.read(row, where)

    def bare(self, text: str, where: str) -> Any:
        """Make an example of a text alone, to predict on; a DataError where that is no example."""
        return self.question({"text": text}, where)

    def cleaned(self, example: Any, clean: Callable[[str], str]) -> Any:
        """The example with its texts cleaned.

        Raises:
            DataError: A text is empty afterwards, or the task's texts must stay as they are.
        """
        raise DataError(f"{example.where}: a text of {self.kind} cannot be cleaned", hint="Leave out data.clean.")

    def keys(self, example: Any) -> Collection[str]:
        """Texts by which rows are the same: two that share one stay on one side of a split."""
        return (example.text,)

    def labels_in(self, example: Any) -> Collection[str]:
        """The labels of an example: they are counted, and splits are stratified by the rarest."""
        return ()

    def notes(self, examples: Iterable[Any]) -> Iterator[str]:
        """Sentences about how the rows of a source were read, where it is worth telling."""
        return iter(())

    def resolve(self, seen: Mapping[str, Seen]) -> Self:
        """Return the task with its labels known, given the labels that stand in the training rows.

        Raises:
            DataError: The labels are not what the recipe says, or no task can be made of them.
        """
        return self

    def weigh(self, examples: Iterable[Any]) -> Self:
        """The task with what follows from the rows that are trained on, such as the weights of their labels."""
        return self

    def check(self, seen: Mapping[str, Seen]) -> None:
        """Compare the labels of a held-out split with the task's.

        Raises:
            DataError: Some are unknown; the message lists them with file and line.
        """

    def class_of(self, label: str) -> int:
        """The index of one of a row's labels, by which splits are stratified.

        Raises:
            KeyError: The label is none of the task's.
        """
        raise KeyError(label)

    def prepare(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Give a base's tokenizer what the task needs, before anything is encoded or saved.

        Raises:
            ModelError: It cannot be used for the task.
        """

    def encode(self, tokenizer: "PreTrainedTokenizerBase", examples: Sequence[Any]) -> list[list[Encoded]]:
        """The token sequences of each example; none for an example that is left out.

        An example without labels gets targets all the same: they mark the items to predict.

        Raises:
            DataError: An example cannot be trained on.
        """
        raise NotImplementedError

    def counted(self, targets: "np.ndarray") -> float:
        """What the loss of these items is divided by: their number, or the sum of their weights."""
        return float(supervised(targets).sum())

    def loss(self, model: "PreTrainedModel", batch: Batch) -> "Tensor":
        """Sum (not mean) of the loss over the items of a batch, in fp32."""
        raise NotImplementedError

    def outputs(self, model: "PreTrainedModel", batch: Batch) -> "Tensor":
        """(B, D, W) fp32 values from which items are scored and predicted."""
        raise NotImplementedError

    def logits(self, model: "PreTrainedModel", batch: Batch) -> "Tensor":
        """(B, ...) fp32 logits by which two models are compared, 0 at padding; no targets are given."""
        raise NotImplementedError

    def choice(self, logits: "np.ndarray") -> "np.ndarray":
        """What logits decide for; where two models' choices differ, an answer flipped. Of one logit: nothing."""
        chosen: np.ndarray = logits.argmax(-1)
        return chosen

    def evidence(self, truth: Ragged, outputs: Ragged) -> "np.ndarray":
        """(R, ...) what each row contributes to the scores; computed once, and resampled by a bootstrap."""
        raise NotImplementedError

    def metrics(self, evidence: "np.ndarray") -> dict[str, float]:
        """Scores by name, the first one first; called again for every resample of the evidence's rows."""
        raise NotImplementedError

    def details(self, evidence: "np.ndarray") -> dict[str, Any]:
        """What a report shows beside the metrics, such as a confusion matrix."""
        return {}

    def errors(self, truth: Ragged, outputs: Ragged) -> dict[str, int]:
        """How many wrong answers there are of each kind, where kinds can be told apart."""
        return {}

    def tune(self, truth: Ragged, outputs: Ragged) -> Self:
        """The task with what is chosen on validation after training, such as thresholds or a temperature."""
        return self

    def uncalibrated(self) -> Self:
        """The task with probabilities as the model gives them, and the same answers."""
        return self

    def certainty(self, truth: Ragged, outputs: Ragged) -> "np.ndarray | None":
        """(N, 3) of each answer that has a probability: that, 1 where it is right, and the truth's log-probability."""
        return None

    def ranking(self, truth: Ragged, outputs: Ragged) -> "dict[str, np.ndarray]":
        """By which rows are shown in a report: `worst`, (R,) how wrong each is, and `uncertain`, how much in doubt."""
        return {}

    def shown(self, example: Any, truth: "np.ndarray", output: "np.ndarray") -> dict[str, str]:
        """A row in words: its `text`, what is `wanted`, what was `found`, and its `probability`, where there is one."""
        raise NotImplementedError

    def baselines(self, train: Iterable[Any], test: Iterable[Any], seed: int) -> dict[str, Ragged]:
        """Outputs on `test` of simple models made from `train`, by name."""
        return {}

    def prediction(self, example: Any, output: Any) -> dict[str, Any]:
        """One line of `lowres-ft predict --json`, from an example and its items' outputs (or the answer written)."""
        raise NotImplementedError

    def line(self, found: Mapping[str, Any]) -> str:
        """A prediction as one line of plain text, its columns separated by tabs."""
        return json.dumps(found, ensure_ascii=False)


def printable(text: str) -> str:
    """A text that stays in its column of a line, and leaves the cursor where it is."""
    return "".join(mark if mark.isprintable() else " " for mark in text)


PLUGIN = Task
