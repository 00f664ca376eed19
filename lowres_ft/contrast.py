"""A model before and after training: sample answers, and the loss on unrelated text."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lowres_ft import batches, evaluate, readers
from lowres_ft.batches import Tokens
from lowres_ft.errors import DataError
from lowres_ft.generation import Writer
from lowres_ft.model import Adapted
from lowres_ft.plan import Plan
from lowres_ft.tasks.base import Ragged
from lowres_ft.tasks.chat import Chat, Conversation

_CONTROL_ROWS = 200
_LONGEST_SAMPLE = 64  # tokens of an answer: enough to see how it is written


@dataclass(frozen=True)
class Probed:
    """What a model does at one time."""

    answers: tuple[str, ...]
    """To the first held-out questions."""
    control_loss: float | None
    """Mean over the tokens of unrelated text."""
    outputs: Ragged | None = None
    """For the test rows."""


@dataclass(frozen=True)
class Contrast:
    """What is asked before and after training."""

    questions: tuple[Conversation, ...]
    wanted: tuple[str, ...]
    """The answers that the rows have."""
    control: Tokens | None
    test: Tokens | None

    def look(self, adapted: Adapted, plan: Plan, *, outputs: bool) -> Probed:
        """Ask a model; `outputs` for the test rows take a pass over all of them."""
        task = adapted.task
        loss = None
        if self.control is not None:
            found = evaluate.outputs(adapted, self.control, plan)
            loss = evaluate.metric(task, self.control.truth, found)
        writer = _writer(adapted)
        return Probed(
            answers=tuple(writer(question) for question in self.questions),
            control_loss=loss,
            outputs=evaluate.outputs(adapted, self.test, plan) if outputs and self.test is not None else None,
        )

    def to_json(self, before: Probed, after: Probed) -> dict[str, Any]:
        """What report.json holds of it: `samples`, and `control_loss` where there is a control."""
        rows = zip(self.questions, self.wanted, before.answers, after.answers, strict=True)
        samples = [
            {"messages": question.messages, "wanted": wanted, "before": first, "after": second}
            for question, wanted, first, second in rows
        ]
        found: dict[str, Any] = {"samples": samples}
        if before.control_loss is not None:
            found["control_loss"] = {"before": before.control_loss, "after": after.control_loss}
        return found


def prepare(adapted: Adapted, tokens: dict[str, Tokens]) -> Contrast:
    """Choose what is asked: questions of the test rows (else of validation), and the recipe's unrelated text.

    Raises:
        DataError: The unrelated text cannot be read.
    """
    task = adapted.task
    assert isinstance(task, Chat)
    held = tokens.get("test", tokens.get("validation"))
    control = None if task.control is None else _control(task, adapted, task.control)
    asked: Iterable[tuple[Conversation, str]] = ()
    if held is not None and held.rows is not None:
        writer = _writer(adapted)
        asked = (_asked(example) for example in held.rows.examples(task))
        asked = (pair for pair in asked if writer.fits(pair[0]))  # one that was cut for training may not
    questions, wanted = [], []
    for question, answer in itertools.islice(asked, task.samples):
        questions.append(question)
        wanted.append(answer)
    return Contrast(tuple(questions), tuple(wanted), control, tokens.get("test"))


def _writer(adapted: Adapted) -> Writer:
    assert isinstance(adapted.task, Chat)
    return Writer(adapted, max_new_tokens=min(_LONGEST_SAMPLE, adapted.task.max_new_tokens))


def _asked(example: Conversation) -> tuple[Conversation, str]:
    """The last question of a conversation that is answered, and its answer."""
    last = max(index for index, message in enumerate(example.messages) if message["role"] == "assistant")
    return Conversation(example.where, example.messages[:last]), example.messages[last]["content"]


def _control(task: Chat, adapted: Adapted, source: str) -> Tokens:
    texts = []
    for where, row in itertools.islice(readers.rows(source), _CONTROL_ROWS):
        if not isinstance(text := row.get("text"), str):
            raise DataError(f"{where}: task.control reads a column 'text'; there are {', '.join(map(repr, row))}")
        texts.append(text)
    encoded = task.plain(adapted.tokenizer, texts)
    if not encoded:
        raise DataError(f"task.control={source} has no text of two tokens or more")
    return batches.in_memory(encoded)
