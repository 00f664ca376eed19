"""Answers of conversations that teach little: one for many questions, or the question again."""

from collections import Counter
from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import Field

from lowres_ft.checks._survey import Part, Survey, normal, shown
from lowres_ft.checks.base import Check, Finding


class Answers(Check):
    """Answers of conversations that teach little: one for many questions, or the question again."""

    kind: Literal["answers"] = "answers"
    sample: int = Field(default=50_000, ge=1)
    """Rows of a split that are looked at, at the most."""
    often: float = Field(default=0.02, gt=0, le=1)
    """Share of all answers from which one that repeats is told."""
    times: int = Field(default=5, ge=2)
    """How often it must stand there at least."""

    def find(self, survey: Survey) -> Iterator[Finding]:
        if not survey.task.generates:
            return
        for part in survey.parts.values():
            positions = part.sample(survey.most or self.sample)
            pairs = [
                (row, normal(before["content"]), normal(message["content"]))
                for row, example in zip(positions.tolist(), part.examples(positions), strict=True)
                for before, message in zip(example.messages, example.messages[1:], strict=False)
                if message["role"] == "assistant"
            ]
            yield from self._repeated(part, pairs, len(positions))
            yield from _echoed(part, pairs, len(positions))

    def _repeated(self, part: Part, pairs: list[tuple[int, str, str]], looked: int) -> Iterator[Finding]:
        counts = Counter(answer for _, _, answer in pairs)
        frequent = {a: n for a, n in counts.items() if n >= max(self.times, self.often * len(pairs))}
        if frequent:
            rows = np.array(list(dict.fromkeys(row for row, _, answer in pairs if answer in frequent)))
            answer = max(frequent, key=lambda one: frequent[one])
            message = f"the same answer stands there {frequent[answer]} times of {len(pairs):,}: {shown(answer)}"
            hint = "The model learns to give it to anything; keep it a few times, or data.distinct=true for whole rows."
            yield part.finding("repeated_answers", "warning", rows, message, hint, of=looked)


def _echoed(part: Part, pairs: list[tuple[int, str, str]], looked: int) -> Iterator[Finding]:
    rows = np.array(list(dict.fromkeys(row for row, asked, answer in pairs if asked == answer)), dtype=np.int64)
    if len(rows):
        severity: Literal["warning", "info"] = "warning" if len(rows) >= 0.01 * looked else "info"
        asked = next(asked for _, asked, answer in pairs if asked == answer)
        message = f"the answer is the question again: {shown(asked)}"
        yield part.finding("echoed_questions", severity, rows, message, "Were columns mixed up?", of=looked)
