"""Text classification: labels for a text or a pair of texts, one or any number of them."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator

from lowres_ft.clean import require_left
from lowres_ft.errors import DataError
from lowres_ft.tasks import _labels, _texts
from lowres_ft.tasks._calibrated import Calibrated
from lowres_ft.tasks._labels import MOST_LABELS, Label, listed, quoted
from lowres_ft.tasks._multi import ALL_BUT_ONE, HALF, Multi, scaled
from lowres_ft.tasks._single import Single
from lowres_ft.tasks.base import NONE, Batch, Encoded, Example, Form, Ragged, Seen, printable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Weight = Annotated[float, Field(gt=0)]
Threshold = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, slots=True)
class Text(Example):
    """A text and its label or labels; None where they are to be predicted."""

    text: str
    label: str | None = None
    pair: str | None = None
    labels: list[str] | None = None


class Classification(Calibrated):
    """One of several labels for each text or pair of texts, or any number of them."""

    kind: Literal["classification"] = "classification"
    labels: tuple[Label, ...] | None = None
    """Names of the classes in order; null finds them in the training rows."""
    pairs: bool = False
    """True for two texts a row, `text` and `pair`: whether one follows from the other, or says the same."""
    multi_label: bool = False
    """True where a text has any number of labels: a list, a text with separators, or a 0/1 column for each."""
    separator: str = Field(default=";", min_length=1)
    """What stands between the labels of a text, where a column holds them as one text."""
    thresholds: dict[str, Threshold] | None = None
    """Probability (calibrated) from which a label is given; those not named here are chosen on validation."""
    class_weights: Literal["none", "balanced"] | dict[str, Weight] = "none"
    """How much a row of each class counts in the loss: `balanced` makes all classes count alike; or `{label: 2.0}`."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that is spread evenly over the classes."""

    example: ClassVar[type[Example]] = Text
    model_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_type: ClassVar[str] = "SEQ_CLS"
    hub_tag: ClassVar[str] = "text-classification"

    @field_validator("labels")
    @classmethod
    def _usable(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if labels is not None and len(labels) < 2:
            raise ValueError("must name at least two classes")
        if labels is not None and not all(label.strip() for label in labels):
            raise ValueError("must not hold an empty name")
        if labels is not None and len(set(labels)) < len(labels):
            raise ValueError("must not name a class twice")
        return labels

    @field_validator("separator", "thresholds")
    @classmethod
    def _for_many(cls, value: Any, info: ValidationInfo) -> Any:
        if value not in (";", None) and not info.data.get("multi_label", True):
            raise ValueError("is for task.multi_label=true")
        return value

    @field_validator("thresholds", "class_weights")
    @classmethod
    def _of_labels(cls, value: Any, info: ValidationInfo) -> Any:
        labels = info.data.get("labels")
        if labels and (sentence := _labels.stranger(value, labels)):
            raise ValueError(sentence)
        return value

    @property
    def in_every_part(self) -> bool:
        return not self.multi_label

    @property
    def metric(self) -> str:
        return Multi.metric if self.multi_label else Single.metric

    @property
    def forms(self) -> tuple[Form, ...]:
        given = ("text", "pair") if self.pairs else ("text",)
        hint = "Where each label has a column of its own, list the labels in task.labels." if self.multi_label else ""
        one_column = Form(given=given, wanted=("label",), hint=hint)
        return (one_column, Form(given=given, wanted=self.classes)) if self._by_column else (one_column,)

    @property
    def _by_column(self) -> bool:
        """Whether each label may have a column: they are known, and none is called like a column of another role."""
        return self.multi_label and self.labels is not None and not {"text", "pair", "label"} & set(self.labels)

    @property
    def names(self) -> tuple[str, ...]:
        return self.labels or ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels, once they are known."""
        assert self.labels is not None, "labels are not resolved yet"
        return self.labels

    @property
    def _answers(self) -> Single | Multi:
        """What is done with the classes."""
        weights = None
        if isinstance(self.class_weights, dict):
            weights = tuple(self.class_weights.get(label, 1.0) for label in self.classes)
        if not self.multi_label:
            return Single(self.classes, weights, self.label_smoothing, self.divisor)
        thresholds = tuple((self.thresholds or {}).get(label, HALF) for label in self.classes)
        return Multi(self.classes, weights, self.label_smoothing, thresholds, self.divisor)

    @property
    def trial(self) -> str:
        return "--file pairs.csv" if self.pairs else super().trial

    @property
    def advice(self) -> str:
        pairs = "Both texts are tokenized together: `tokenizer(text, pair)`. " * self.pairs
        given = json.dumps(self.thresholds, ensure_ascii=False) if self.thresholds else ""
        return (
            pairs + super().advice + f" A label is given from these probabilities on: {given}" * bool(given)
        ).strip()

    def model_config_fields(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.classes),
            "id2label": dict(enumerate(self.classes)),
            "label2id": {label: index for index, label in enumerate(self.classes)},
            "problem_type": self._answers.problem_type,
        }

    def read(self, row: Mapping[str, Any], where: str) -> Text:
        text = _texts.one(row, "text", where)
        pair = _texts.one(row, "pair", where) if self.pairs else None
        if "label" in row:
            if self.multi_label:
                return Text(where, text, pair=pair, labels=_labels.several(row["label"], self.separator, where))
            return Text(where, text, _labels.one(row["label"], where), pair)
        if self._by_column and self.classes[0] in row:
            return Text(where, text, pair=pair, labels=_labels.by_column(row, self.classes, where))
        return Text(where, text, pair=pair)

    def bare(self, text: str, where: str) -> Text:
        if self.pairs:
            raise DataError(
                f"{where} is a text alone, but this model compares two",
                hint="Give a file with both: --file F, a CSV, TSV, JSONL or Parquet file with a column for each.",
            )
        return self.read({"text": text}, where)

    def cleaned(self, example: Text, clean: Callable[[str], str]) -> Text:
        text = require_left(clean(example.text), f"{example.where}: the text")
        pair = None if example.pair is None else require_left(clean(example.pair), f"{example.where}: the pair")
        return replace(example, text=text, pair=pair)

    def keys(self, example: Text) -> Collection[str]:
        if example.pair is None:
            return (example.text,)
        return (f"{len(example.text)} {example.text}{example.pair}",)  # no two pairs give one text

    def labels_in(self, example: Text) -> Collection[str]:
        return example.labels or () if example.label is None else (example.label,)

    def resolve(self, seen: Mapping[str, Seen]) -> Self:
        if len(seen) > MOST_LABELS:
            raise DataError(
                f"more than {MOST_LABELS:,} different labels, such as {quoted(next(iter(seen)))}",
                hint="Is this the label column? Map it with data.columns.label=NAME.",
            )
        if self.multi_label and self.labels is None:
            _labels.require_separated(seen, self.separator)
        task = self if self.labels else self.model_copy(update={"labels": _labels.found(seen)})
        task.check(seen)
        present = {task.class_of(label) for label in seen}
        if len(present) < 2:
            raise self._too_few(seen)
        if missing := [label for index, label in enumerate(task.classes) if index not in present]:
            raise DataError(
                f"task.labels names {', '.join(map(repr, missing))}, which no training row has",
                hint=f"Found are {listed(seen)}. Correct task.labels, or leave it out to find them.",
            )
        for field in ("thresholds", "class_weights"):
            if sentence := _labels.stranger(getattr(task, field), task.classes):
                raise DataError(f"task.{field} {sentence}", hint=f"Found are {listed(task.classes)}.")
        return task

    def _too_few(self, seen: Mapping[str, Seen]) -> DataError:
        if not seen:
            return DataError("no row has a label", hint="Is this the label column? data.columns.label=NAME maps it.")
        label, at = next(iter(seen.items()))
        which = "the only label is" if self.multi_label else "every row has the label"
        return DataError(
            f"{which} {quoted(label)} (first {at.where}); a classifier needs two classes",
            hint="Add rows of another class.",
        )

    def weigh(self, examples: Iterable[Text]) -> Self:
        """N / (C n) of a class with n of the N rows; for any number of labels, rows without one / rows with it."""
        if self.class_weights != "balanced":
            return self
        classes = [{self.class_of(label) for label in self.labels_in(example)} for example in examples]
        rows, count = len(classes), Counter(itertools.chain(*classes))
        weights = {
            # A label that every row has weighs 1: at a weight of 0 it would not be learned.
            label: (rows - count[index] or rows) / count[index]
            if self.multi_label
            else rows / (len(self.classes) * count[index])
            for index, label in enumerate(self.classes)
        }
        return self.model_copy(update={"class_weights": weights})

    def check(self, seen: Mapping[str, Seen]) -> None:
        if unknown := {label: at for label, at in seen.items() if not self._known(label)}:
            raise _labels.told_unknown(unknown, self.classes)

    def _known(self, label: str) -> bool:
        try:
            self.class_of(label)
        except KeyError:
            return False
        return True

    def class_of(self, label: str) -> int:
        return _labels.class_of(label, self.classes)

    def prepare(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if self.pairs:
            _texts.require_pairs(tokenizer)

    def encode(self, tokenizer: "PreTrainedTokenizerBase", examples: Sequence[Text]) -> list[list[Encoded]]:
        second = [example.pair for example in examples] if self.pairs else None
        found = tokenizer([example.text for example in examples], second, truncation=True, max_length=self.max_length)
        segments = found.get("token_type_ids") if self.pairs else None
        return [
            [
                Encoded(
                    list(ids) or [tokenizer.pad_token_id],
                    self._targets(example),
                    None if segments is None else list(segments[row]) or [0],
                )
            ]
            for row, (ids, example) in enumerate(zip(found["input_ids"], examples, strict=True))
        ]

    def _targets(self, example: Text) -> list[int]:
        return self._answers.targets({self.class_of(label) for label in self.labels_in(example)})

    def counted(self, targets: "np.ndarray") -> float:
        return self._answers.counted(targets)

    def loss(self, model: "PreTrainedModel", batch: Batch) -> "Tensor":
        return self._answers.loss(self.logits(model, batch), batch.targets)

    def outputs(self, model: "PreTrainedModel", batch: Batch) -> "Tensor":
        return self._answers.outputs(self.logits(model, batch))

    def logits(self, model: "PreTrainedModel", batch: Batch) -> "Tensor":
        segments = {}
        if batch.segments is not None and getattr(model.config, "type_vocab_size", 0) > 1:
            segments["token_type_ids"] = batch.segments
        logits: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask, **segments).logits
        return logits.float()

    def choice(self, logits: "np.ndarray") -> "np.ndarray":
        return self._answers.choice(logits)

    def evidence(self, truth: Ragged, outputs: Ragged) -> "np.ndarray":
        return self._answers.evidence(truth, outputs)

    def metrics(self, evidence: "np.ndarray") -> dict[str, float]:
        return self._answers.metrics(evidence)

    def details(self, evidence: "np.ndarray") -> dict[str, Any]:
        return self._answers.details(evidence)

    def tune(self, truth: Ragged, outputs: Ragged) -> Self:
        task = self.fitted(truth, outputs)
        answers = self._answers
        if isinstance(answers, Single):
            return task
        thresholds = replace(answers, temperature=task.divisor).tuned(truth, outputs)
        if max(thresholds.values()) > ALL_BUT_ONE:
            task, thresholds = self, answers.tuned(truth, outputs)
        return task.model_copy(update={"thresholds": thresholds | (self.thresholds or {})})

    def uncalibrated(self) -> Self:
        thresholds = {label: scaled(value, 1 / self.divisor) for label, value in (self.thresholds or {}).items()}
        return super().uncalibrated().model_copy(update={"thresholds": thresholds or None})

    def certainty(self, truth: Ragged, outputs: Ragged) -> "np.ndarray":
        return self._answers.certainty(truth, outputs)

    def ranking(self, truth: Ragged, outputs: Ragged) -> "dict[str, np.ndarray]":
        return self._answers.ranking(truth, outputs)

    def shown(self, example: Text, truth: "np.ndarray", output: "np.ndarray") -> dict[str, str]:
        found = self._answers.answer(output)
        given = [label for label in self.classes if label in found["labels"]] if self.multi_label else [found["label"]]
        sure = ", ".join(f"{found['scores'][label]:.3f}" for label in given)
        text = example.text if example.pair is None else f"{example.text}\n{example.pair}"
        answer = {"found": ", ".join(given) or NONE, "probability": sure}
        return {"text": text, "wanted": self._answers.wanted(truth)} | answer

    def baselines(self, train: Iterable[Text], test: Iterable[Text], seed: int) -> dict[str, Ragged]:
        """Outputs that follow from the labels' shares, and those of TF-IDF with logistic regression."""
        import numpy as np

        rows, texts = list(itertools.islice(train, self.baseline_rows)), list(test)
        found = self._answers.baselines(rows, np.array([self._targets(row) for row in rows]), texts, seed)
        return {
            name: Ragged(values, np.arange(len(texts) + 1) * (len(values) // len(texts)))
            for name, values in found.items()
        }

    def prediction(self, example: Text, output: "np.ndarray") -> dict[str, Any]:
        pair = {} if example.pair is None else {"pair": example.pair}
        return {"text": example.text} | pair | self._answers.answer(output)

    def line(self, found: Mapping[str, Any]) -> str:
        given = found["labels"] if self.multi_label else [found["label"]]
        scores = ", ".join(f"{found['scores'][label]:.3f}" for label in given)
        texts = [found[role] for role in ("text", "pair") if role in found]
        return "\t".join(map(printable, [", ".join(given), scores, *texts]))
