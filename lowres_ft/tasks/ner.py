"""Named entity recognition: a tag for each word, and spans of the text as answers."""

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator

from lowres_ft.errors import DataError
from lowres_ft.spec import shown
from lowres_ft.tasks import _labels, _sentence, _single, _tags
from lowres_ft.tasks._calibrated import Calibrated
from lowres_ft.tasks._gazetteer import Gazetteer
from lowres_ft.tasks._sentence import Sentence
from lowres_ft.tasks._windows import Cutter, StandIns, align
from lowres_ft.tasks.base import IGNORED, NONE, Batch, Encoded, Example, Form, Ragged, Seen, printable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_TYPES = 200


class Ner(Calibrated):
    """Entities of several types in each text, as tagged words or as spans of characters.

    The items are the words. A word is tagged at its first word piece; so a text has as many items, in the same order,
    whatever windows it is cut into.
    """

    kind: Literal["ner"] = "ner"
    max_length: int = Field(default=128, ge=8)
    """Tokens of a window; a longer text is read in several, and memory grows with it."""
    overlap: int = Field(default=32, ge=0)
    """Tokens that neighbouring windows share, at most half a window; each word is tagged where it has more context."""
    labels: tuple[str, ...] | None = None
    """Types of entities, such as PER; null finds them in the training rows."""

    example: ClassVar[type[Example]] = Sentence
    model_class: ClassVar[str] = "AutoModelForTokenClassification"
    peft_type: ClassVar[str] = "TOKEN_CLS"
    hub_tag: ClassVar[str] = "token-classification"
    in_every_part: ClassVar[bool] = False
    spans_refer_to_text: ClassVar[bool] = True

    @field_validator("labels")
    @classmethod
    def _usable(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if labels is not None and not labels:
            raise ValueError("must name at least one type")
        if labels is not None and not all(label.strip() for label in labels):
            raise ValueError("must not hold an empty name")
        if labels is not None and len(set(labels)) < len(labels):
            raise ValueError("must not name a type twice")
        return labels

    @property
    def metric(self) -> str:
        return "f1"

    @property
    def forms(self) -> tuple[Form, ...]:
        return (Form(given=("words",), wanted=("tags",)), Form(given=("text",), wanted=("entities",)))

    @property
    def names(self) -> tuple[str, ...]:
        """The tags: O, then B- and I- of each type."""
        return () if self.labels is None else _tags.of_types(self.labels)

    @property
    def types(self) -> tuple[str, ...]:
        """The types of entities, once they are known."""
        assert self.labels is not None, "labels are not resolved yet"
        return self.labels

    def model_config_fields(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {tag: index for index, tag in enumerate(self.names)},
        }

    def read(self, row: Mapping[str, Any], where: str) -> Sentence:
        return _sentence.from_words(row, where) if "words" in row else _sentence.from_text(row, where)

    def labels_in(self, example: Sentence) -> Collection[str]:
        return _tags.types_in(example.tags or ())

    def notes(self, examples: Iterable[Sentence]) -> Iterator[str]:
        """Tell what was read otherwise than it stands: the tags of another scheme, and spans that had white space."""
        begun, first, trimmed, iob1 = 0, "", 0, True
        for example in examples:
            places = list(_tags.begun_inside(example.tags or ()))
            if places and not begun:
                first = f"{(example.tags or ())[places[0]]}, {example.where}, {example.word(places[0])}"
            begun += len(places)
            trimmed += example.trimmed
            iob1 = iob1 and _tags.may_be_iob1(example.tags or ())
        if begun and iob1:
            yield f"the tags are IOB1, where I- may begin an entity (first {first}); they are read as BIO"
        elif begun:
            yield f"{begun} tags go on with an entity that none begins; they are read as its beginning (first {first})"
        if trimmed:
            yield f"{trimmed} entities had white space at their ends, which is left out of them"

    def resolve(self, seen: Mapping[str, Seen]) -> Self:
        if not seen:
            raise DataError("no training row has an entity", hint="Are these the right columns? See data.columns.")
        if len(seen) > MOST_TYPES:
            raise DataError(
                f"more than {MOST_TYPES} types of entities, such as {shown(next(iter(seen)))}",
                hint="A type is a word such as PER, not the entity itself.",
            )
        task = self if self.labels else self.model_copy(update={"labels": _labels.found(seen)})
        task.check(seen)
        if missing := [label for label in task.types if label not in seen]:
            raise DataError(
                f"task.labels names {', '.join(map(shown, missing))}, which no training row has",
                hint=f"Found are {_labels.listed(seen)}. Correct task.labels, or leave it out to find them.",
            )
        return task

    def check(self, seen: Mapping[str, Seen]) -> None:
        if unknown := {label: at for label, at in seen.items() if label not in self.types}:
            raise _labels.told_unknown(unknown, self.types)

    def class_of(self, label: str) -> int:
        if label not in self.types:
            raise KeyError(label)
        return self.types.index(label)

    def encode(self, tokenizer: "PreTrainedTokenizerBase", examples: Sequence[Sentence]) -> list[list[Encoded]]:
        """Tokenize the texts as they are, so that any client gets the same pieces, and find each word's first one."""
        cutter = Cutter.of(tokenizer, self.max_length, self.overlap)
        stand_ins = StandIns.of(tokenizer)
        texts = [example.text for example in examples]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        found = []
        for example, ids, offsets in zip(examples, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            found.append(cutter.cut(align(ids, offsets, example.words, stand_ins), self._classes(example)))
        return found

    def _classes(self, example: Sentence) -> list[int]:
        """The class of each word; O where there are no tags."""
        if example.tags is None:
            return [0] * len(example.words)
        index = {tag: number for number, tag in enumerate(self.names)}
        return [index[tag] for tag in _tags.to_bio(example.tags)]

    def loss(self, model: "PreTrainedModel", batch: Batch) -> "Tensor":
        from torch.nn.functional import cross_entropy

        logits = self.outputs(model, batch).flatten(0, 1)
        return cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def outputs(self, model: "PreTrainedModel", batch: Batch) -> "Tensor":
        logits: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask).logits
        return logits.float()

    def logits(self, model: "PreTrainedModel", batch: Batch) -> "Tensor":
        return self.outputs(model, batch).masked_fill(batch.mask[..., None] == 0, 0.0)

    def evidence(self, truth: Ragged, outputs: Ragged) -> "np.ndarray":
        """(R, types, 3): entities found rightly, entities found, and entities that there are.

        One is right if its borders and its type are, as in the CoNLL-2003 shared task and in seqeval.
        """
        import numpy as np

        size = len(truth) * len(self.types)
        gold = _tags.entities(truth.values, truth.row_of)
        found = _tags.entities(outputs.values.argmax(1), truth.row_of)
        scale = np.array([len(truth.values) * len(self.types), len(self.types), 1])  # makes one number of the three
        right = found[np.isin(found @ scale, gold @ scale)]
        counts = [
            np.bincount(truth.row_of[one[:, 0]] * len(self.types) + one[:, 2], minlength=size)
            for one in (right, found, gold)
        ]
        return np.stack(counts, axis=1).reshape(len(truth), len(self.types), 3)

    def metrics(self, evidence: "np.ndarray") -> dict[str, float]:
        """Micro averages over all entities; a ratio without cases is 0, as in seqeval."""
        precision, recall, f1 = _ratios(evidence.sum((0, 1)))
        return {"f1": float(f1), "precision": float(precision), "recall": float(recall)}

    def details(self, evidence: "np.ndarray") -> dict[str, Any]:
        counts = evidence.sum(0)
        precision, recall, f1 = _ratios(counts)
        columns = {"precision": precision, "recall": recall, "f1": f1, "support": counts[:, 2]}
        return {
            "types": {
                label: {name: column[index].item() for name, column in columns.items()}
                for index, label in enumerate(self.types)
            }
        }

    def errors(self, truth: Ragged, outputs: Ragged) -> dict[str, int]:
        return _tags.errors(truth.values, outputs.values.argmax(1), truth.row_of)

    def tune(self, truth: Ragged, outputs: Ragged) -> Self:
        return self.fitted(truth, outputs)

    def certainty(self, truth: Ragged, outputs: Ragged) -> "np.ndarray":
        """(words, 3): the answers are the words' tags."""
        return _single.certainty(truth.values, outputs.values / self.divisor)

    def ranking(self, truth: Ragged, outputs: Ragged) -> "dict[str, np.ndarray]":
        """Worst is the least probability of all of a text's tags being as they are; in doubt, one of its tags."""
        import numpy as np

        sure = self.certainty(truth, outputs)
        doubt = np.zeros(len(truth))
        np.maximum.at(doubt, truth.row_of, 1 - sure[:, 0])
        return {"worst": np.bincount(truth.row_of, -sure[:, 2], minlength=len(truth)), "uncertain": doubt}

    def shown(self, example: Sentence, truth: "np.ndarray", output: "np.ndarray") -> dict[str, str]:
        import numpy as np

        spans = _tags.entities(truth, np.zeros(len(truth))).tolist()
        words = example.words
        wanted = [f"{example.text[words[a][0] : words[b - 1][1]]} [{self.types[kind]}]" for a, b, kind in spans]
        found = self.prediction(example, output)["entities"]
        answers = [f"{one['text']} [{one['label']}]" for one in found]
        sure = ", ".join(f"{one['score']:.3f}" for one in found)
        answer = {"found": ", ".join(answers) or NONE, "probability": sure}
        return {"text": example.text, "wanted": ", ".join(wanted) or NONE} | answer

    def baselines(self, train: Iterable[Sentence], test: Iterable[Sentence], seed: int) -> dict[str, Ragged]:
        """No entity at all, and the entities of train known by heart."""
        import numpy as np

        known = Gazetteer.of([(row.strings, row.tags or ()) for row in itertools.islice(train, self.baseline_rows)])
        words = [row.strings for row in test]
        index = {tag: number for number, tag in enumerate(self.names)}
        sure = np.eye(len(self.names), dtype=np.float32)
        found = {
            "majority": [sure[[0] * len(one)] for one in words],
            "gazetteer": [sure[[index[tag] for tag in known.tags(one)]] for one in words],
        }
        return {name: Ragged.of(rows) for name, rows in found.items()}

    def prediction(self, example: Sentence, output: "np.ndarray") -> dict[str, Any]:
        """Spans of characters of the text as given; a score is the mean probability of its words' tags."""
        import numpy as np

        classes = output.argmax(1)
        sure = np.exp(_single.log_softmax(output / self.divisor).max(1))
        entities = []
        for first, last, kind in _tags.entities(classes, np.zeros(len(classes))).tolist():
            start, end = example.words[first][0], example.words[last - 1][1]
            place = {"start": start, "end": end, "label": self.types[kind], "score": float(sure[first:last].mean())}
            entities.append(place | {"text": example.text[start:end]})
        return {"text": example.text, "entities": entities}

    def line(self, found: Mapping[str, Any]) -> str:
        entities = [f"{one['text']} [{one['label']} {one['score']:.3f}]" for one in found["entities"]]
        return "\t".join(map(printable, [found["text"], *entities]))


def _ratios(counts: "np.ndarray") -> "tuple[np.ndarray, np.ndarray, np.ndarray]":
    """Precision, recall and F1 of (..., 3) counts of right, found and true entities."""
    import numpy as np

    right, found, true = counts[..., 0], counts[..., 1], counts[..., 2]
    return right / np.maximum(found, 1), right / np.maximum(true, 1), 2 * right / np.maximum(found + true, 1)
