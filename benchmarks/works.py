"""What is measured: works, contenders and goals, as data. Nothing heavy is imported here.

Steps are chosen so that one whole run takes about 40 minutes on two cores, where Trainer trains 1,000 to 1,400 tokens/s
on (a) and (b) and TRL 135 on (c).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Numbers = Literal["fp32", "bf16", "int8"]
Figure = Literal["tokens/s", "memory", "weights", "share of limit"]
EVEN = " even"
"""How the names of peers on even terms end."""
SEED = 7
"""Of the split that gives the rows, and of the first repeat; the next ones train with 8, 9, ..."""


@dataclass(frozen=True)
class Contender:
    """One program with one set of options."""

    name: str
    family: Literal["ours", "trainer", "trl_sft", "textbook"]
    """The file in contenders/ that runs it."""
    numbers: Numbers
    """What computes and how the frozen weights are held; int8 weights compute in bf16."""
    even: bool = False
    """True for even terms: no dropout in base and adapter, nothing computed twice to save memory, as ours does it."""
    packed: bool = False
    """True where several texts share a row of the batch."""
    full: bool = False
    """True where all weights are trained: another experiment, whose loss is shown but not compared."""
    part: int = 1
    """Only one in `part` of the timed steps is taken, where they are slow and all alike."""

    @property
    def dtype(self) -> str:
        """What computes, by PyTorch's name."""
        return "float32" if self.numbers == "fp32" else "bfloat16"


OURS_BF16 = Contender("ours bf16", "ours", "bf16", even=True)
OURS_INT8 = Contender("ours int8", "ours", "int8", even=True)
OURS_FP32 = Contender("ours fp32", "ours", "fp32", even=True)
TEXTBOOK = Contender("textbook fp32", "textbook", "fp32", full=True, part=3)
_TRAINER = tuple(
    Contender(f"trainer {numbers}{EVEN * even}", "trainer", numbers, even=even)
    for numbers in ("bf16", "int8", "fp32")
    for even in (False, True)
)
_TRL = tuple(
    Contender(f"trl bf16{' packed' * packed}{EVEN * even}", "trl_sft", "bf16", even, packed)
    for packed in (False, True)
    for even in (False, True)
)


@dataclass(frozen=True)
class Work:
    """Rows, a base and an adapter, which all contenders share, and how long they work."""

    name: str
    title: str
    recipe: str
    """A shipped recipe: base, adapter, labels and learning rate come from it."""
    overrides: tuple[str, ...]
    batch_size: int
    warmup: int
    """Steps before the clock starts."""
    steps: int
    """Steps that are timed. Warm-up and these go once over the rows, so that all contenders learn from the same."""
    held_out: int
    """Rows on which the losses are compared after the last step."""
    tolerance: float
    """How far the median loss (nats an item) of a peer may lie from ours; orders of rows and dropout differ."""
    contenders: tuple[Contender, ...]
    predicts: bool = False
    """True where an adapter that was trained before predicts on the rows, steps being batches of the peers."""

    @property
    def rows(self) -> int:
        """Rows that a contender works on."""
        return self.batch_size * (self.steps if self.predicts else self.warmup + self.steps)

    @property
    def clocked(self) -> int:
        """Steps that the clock sees before it starts: a whole prediction on a few rows is one."""
        return 1 if self.predicts else self.warmup

    def named(self, name: str) -> Contender:
        """The contender of a name."""
        return next(contender for contender in self.contenders if contender.name == name)


_NO_WARMUP = "train.warmup=0"  # of the learning rate: Trainer's default
_IMDB = ("data.train=starter:imdb", "task.max_length=256", _NO_WARMUP)
_ALL = (OURS_BF16, OURS_INT8, OURS_FP32, *_TRAINER, TEXTBOOK)
WORKS: Mapping[str, Work] = {
    "a": Work(
        name="a",
        title="Rotten Tomatoes, MiniLM, LoRA r16 on all linear layers, 128 tokens",
        recipe="sentiment-lora",
        overrides=(_NO_WARMUP,),
        batch_size=32,
        warmup=4,
        steps=24,
        held_out=256,
        tolerance=0.1,
        contenders=_ALL,
    ),
    "b": Work(
        name="b",
        title="IMDb, MiniLM, LoRA r16 on all linear layers, 256 tokens",
        recipe="sentiment-lora",
        overrides=_IMDB,
        batch_size=32,
        warmup=1,
        steps=5,
        held_out=128,
        tolerance=0.1,
        contenders=_ALL,
    ),
    "c": Work(
        name="c",
        title="dialogs, SmolLM2-135M, LoRA r16 on all linear layers, 256 tokens, loss on answers only",
        recipe="chat-lora-int8",
        overrides=("model.quantize=none", _NO_WARMUP),
        batch_size=8,
        warmup=2,
        steps=6,
        held_out=64,
        tolerance=0.15,
        contenders=(OURS_BF16, OURS_INT8, *_TRL, TEXTBOOK),
    ),
    "d": Work(
        name="d",
        title="prediction on 2,000 IMDb rows, MiniLM with an adapter, 256 tokens",
        recipe="sentiment-lora",
        overrides=_IMDB,
        batch_size=16,
        warmup=4,
        steps=125,
        held_out=128,
        tolerance=0.01,
        contenders=(
            OURS_BF16,
            Contender("trainer bf16", "trainer", "bf16"),
            Contender("trainer bf16 even", "trainer", "bf16", even=True),
        ),
        predicts=True,
    ),
}


def chosen(name: str, *, quick: bool = False) -> Work:
    """A work by its name; a quick one has but a few steps."""
    work = WORKS[name]
    if not quick:
        return work
    return replace(work, warmup=1, steps=8 if work.predicts else 2, held_out=32)


@dataclass(frozen=True)
class Goal:
    """What one of ours is to reach, against the best of some peers, or by itself where there are none."""

    work: str
    figure: Figure
    ours: str
    peers: tuple[str, ...]
    """On even terms."""
    bound: float

    @property
    def at_least(self) -> bool:
        """Whether more is better."""
        return self.figure in ("tokens/s", "share of limit")

    @property
    def as_they_come(self) -> "Goal":
        """The same goal against the peers as users run them."""
        return replace(self, peers=tuple(peer.removesuffix(EVEN) for peer in self.peers))

    def met(self, value: float) -> bool:
        """Whether a measured value reaches it."""
        return value >= self.bound if self.at_least else value <= self.bound


def _pair(work: str, ours: str, peers: tuple[str, ...], speed: float, memory: float) -> tuple[Goal, Goal]:
    return Goal(work, "tokens/s", ours, peers, speed), Goal(work, "memory", ours, peers, memory)


GOALS: tuple[Goal, ...] = (
    *_pair("a", "ours bf16", ("trainer bf16 even",), 6.0, 0.6),
    *_pair("a", "ours int8", ("trainer int8 even",), 6.0, 0.5),
    Goal("a", "tokens/s", "ours int8", ("ours bf16",), 0.9),
    Goal("a", "weights", "ours int8", ("ours bf16",), 0.55),
    Goal("a", "share of limit", "ours bf16", (), 0.25),
    *_pair("b", "ours bf16", ("trainer bf16 even",), 9.0, 0.3),
    *_pair("b", "ours int8", ("trainer int8 even",), 10.0, 0.25),
    Goal("b", "tokens/s", "ours int8", ("ours bf16",), 0.9),
    Goal("b", "weights", "ours int8", ("ours bf16",), 0.55),
    Goal("b", "share of limit", "ours bf16", (), 0.25),
    *_pair("c", "ours bf16", ("trl bf16 even", "trl bf16 packed even"), 4.0, 0.3),
    *_pair("d", "ours bf16", ("trainer bf16 even",), 2.0, 0.6),
)
