"""What a contender is given, and what it gives back."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.works import Contender, Work

Sequences = list[tuple[list[int], list[int]]]
"""Token ids of each row, and its targets as the task gives them: its class, or for each token the next one or -100."""


@dataclass(frozen=True)
class Job:
    """One run of one contender."""

    work: Work
    contender: Contender
    folder: Path
    """Where `prepare` wrote the rows."""
    seed: int
    device: str
    """'cpu' or 'cuda'."""

    @cached_property
    def prepared(self) -> dict[str, Any]:
        """What `prepare` found out: the base's folder, the labels, counts, FLOPs of a token."""
        found: dict[str, Any] = json.loads((self.folder / "prepared.json").read_text(encoding="utf-8"))
        return found

    @property
    def base(self) -> str:
        """The folder of the base."""
        return str(self.prepared["base"])

    @property
    def chats(self) -> bool:
        """Whether a language model learns answers, not a classifier labels."""
        return bool(self.prepared["chats"])

    @property
    def total_steps(self) -> int:
        """Steps, the untimed ones too."""
        return self.work.warmup + max(1, self.work.steps // self.contender.part)

    @property
    def learning_rate(self) -> float:
        """The recipe's."""
        return float(self.prepared["learning_rate"])

    def sequences(self, split: str) -> Sequences:
        """The tokens of `rows` or `held_out`."""
        found = json.loads((self.folder / "tokens.json").read_text(encoding="utf-8"))[split]
        return [(ids, targets) for ids, targets in found]


@dataclass
class Clock:
    """Counts steps, the first `warmup` of which are not timed."""

    warmup: int
    device: str
    times: list[float] = field(default_factory=list)
    """When each step ended."""
    tokens: list[int] = field(default_factory=list)
    """Real tokens of each step."""

    def step(self, tokens: int) -> None:
        """A step has ended."""
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        self.tokens.append(tokens)

    @property
    def seconds(self) -> float:
        """From the end of the warm-up to the end of the last step: what happens between steps counts."""
        return self.times[-1] - self.times[self.warmup - 1]

    @property
    def timed_tokens(self) -> int:
        """Real tokens of the timed steps."""
        return sum(self.tokens[self.warmup :])


@dataclass(frozen=True)
class Made:
    """What a contender leaves behind after its last step."""

    logits: Callable[[Any, Any], Any]
    """(B, T) token ids and mask -> logits, with dropout off."""
    pad: int
    """The token that pads."""
    trainable_parameters: int
    frozen_bytes: int
    """All that is held but not trained."""
    linear_bytes: int | None = None
    """Of it, the weights of the adapted layers with their scales; known of ours alone."""
    plan: dict[str, Any] | None = None
    """How our library chose to run."""
