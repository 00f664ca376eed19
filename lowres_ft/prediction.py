"""Predictions of a bundle for texts, and its scores on other rows."""

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowres_ft import clean, data, evaluate, readers
from lowres_ft.batches import in_memory, tokenize, told
from lowres_ft.bundle import Bundle
from lowres_ft.data import Rows
from lowres_ft.errors import DataError
from lowres_ft.evaluate import Scores
from lowres_ft.events import Listener, Note, unheard
from lowres_ft.generation import Heard, Writer
from lowres_ft.model import Adapted
from lowres_ft.plan import Plan

_AT_ONCE = 1024  # texts that stand in memory together


class Predictor:
    """A bundle's model, ready to predict."""

    def __init__(self, adapted: Adapted, plan: Plan, *, heard: Heard | None = None, calibrated: bool = True) -> None:
        """`heard` is called with each piece of an answer as a chat model writes it.

        Probabilities are calibrated where the bundle has a temperature, or as the model gives them; the answers are the
        same.
        """
        self.adapted = adapted if calibrated else replace(adapted, task=adapted.task.uncalibrated())
        self.plan = plan
        self.heard = heard

    def __call__(self, examples: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """Yield what `lowres-ft predict --json` prints, one for each example, in order."""
        task = self.adapted.task
        if task.generates:
            writer = Writer(self.adapted)
            for example in examples:
                yield task.prediction(example, writer(self._cleaned(example), self.heard))
            return
        iterator = iter(examples)
        while part := list(itertools.islice(iterator, _AT_ONCE)):
            tokens = in_memory(task.encode(self.adapted.tokenizer, [self._cleaned(example) for example in part]))
            outputs = evaluate.outputs(self.adapted, tokens, self.plan)
            yield from (task.prediction(example, output) for example, output in zip(part, outputs, strict=True))

    def _cleaned(self, example: Any) -> Any:
        """What the model reads of an example: cleaned as the rows were that it learned from."""
        return clean.cleaned(self.adapted.task, example, self.adapted.cleaners)

    def texts(self, texts: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Like a call, for bare texts.

        Raises:
            DataError: A text holds half a character, as an argument that is not UTF-8 does.
        """
        named = ((text, f"text {number}") for number, text in enumerate(texts, start=1))
        return self(self.adapted.task.bare(clean.require_utf8(text, name), name) for text, name in named)


def examples(bundle: Bundle, file: str) -> Iterator[Any]:
    """The texts of a CSV, TSV, JSONL or Parquet file (its text column as the recipe maps it), or one a line.

    Raises:
        DataError: The file cannot be read, or lacks the column.
    """
    path = Path(file)
    if path.suffix.lower() not in readers.ENDINGS:
        if not os.path.isfile(path):
            raise DataError(f"no file {file}", hint=f"The current folder is {Path.cwd()}.")
        for number, line in readers.lines(path, file):
            if line.strip():
                yield bundle.recipe.task.bare(line.rstrip("\r\n"), f"{file}:{number}")
        return
    task, columns = bundle.recipe.task, bundle.recipe.data.columns
    for where, row in readers.rows(file):
        yield task.question(data.by_role(row, where, task.forms, columns, labelled=False), where)


def held_out(bundle: Bundle, work: Path, source: str | None) -> tuple[Rows, str]:
    """Rows to score a bundle on, and what they are: a data source, else the recipe's own test rows.

    Raises:
        DataError: The rows cannot be read, there are none, or the recipe's data is not what was trained on.
    """
    task = bundle.recipe.task
    if source is not None:
        spec = bundle.recipe.data
        rows, seen = data.store(source, task, spec.columns, work / "rows.arrow", cleaners=spec.clean)
        task.check(seen)
        return rows, source
    found = data.load(bundle.recipe, work)
    if found.test is None:
        raise DataError("the recipe has no test rows", hint="Say which rows with --data.")
    if found.fingerprint() != bundle.passport.data:
        raise DataError(
            f"the rows of {bundle.recipe.data.train} have changed since training, so its test rows are not the same",
            hint="Say which rows with --data.",
        )
    return found.test, "the recipe's test rows"


def evaluate_bundle(
    bundle: Bundle, adapted: Adapted, plan: Plan, work: Path, source: str | None = None, *, listen: Listener = unheard
) -> Scores:
    """Score a bundle's model on a data source, else on the recipe's test rows; rows that are left out are told.

    Raises:
        DataError: There are no such rows; see `held_out`.
    """
    rows, name = held_out(bundle, work, source)
    tokens = tokenize(adapted, rows, work / "rows")
    if tokens.left_out:
        listen(Note(told(name, tokens)))
    return evaluate.score(bundle.recipe.task, tokens.truth, evaluate.outputs(adapted, tokens, plan))
