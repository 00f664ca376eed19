"""What is measured on a GPU, as data: shapes of models, ways to train them, and cells, a shape trained in a way."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Numbers = Literal["bf16", "int8", "nf4"]
"""How the frozen weights of linear layers are held."""

LENGTHS = (512, 2048)
CAPS = (15.0, 8.0, 6.0)  # GiB
GOAL_CAP = 12.0  # GiB
PASSING_CAP = 4.0  # GiB in which layers of 8B parameters pass
RANK = 16
_TINY_LENGTH = {512: 16, 2048: 32}
_TINY_TOKENS = 64


@dataclass(frozen=True)
class Shape:
    """A model without its weights, as its files on the Hub would have it."""

    config: Mapping[str, Any]
    """transformers' config, with no dropout anywhere."""
    generates: bool
    """Whether a language model learns the last half of each row, not a classifier a class."""
    published: Literal["bfloat16", "float32"]
    """The dtype of the files, in which Trainer holds what it does not quantize."""
    tokens: int
    """Of a step: as many as Trainer takes at once on a large GPU."""
    tiny: Mapping[str, Any]
    """What is another in the config of a tiny model of this architecture."""

    @property
    def positions(self) -> int:
        """The longest row."""
        return int(self.config["max_position_embeddings"])


_LLAMA_3 = {"model_type": "llama", "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
_QWEN_3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
_TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_MARKS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
_TINY_WRITER = _TINY | {"num_key_value_heads": 2, "head_dim": 16}

SHAPES: dict[str, Shape] = {
    "llama-3.1-8b": Shape(
        config=_LLAMA_3
        | {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": False,
        },
        generates=True,
        published="bfloat16",
        tokens=2048,
        tiny=_TINY_WRITER,
    ),
    "qwen3-4b": Shape(
        config=_QWEN_3
        | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
        generates=True,
        published="bfloat16",
        tokens=4096,
        tiny=_TINY_WRITER,
    ),
    "qwen3-0.6b": Shape(
        config=_QWEN_3
        | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
        generates=True,
        published="bfloat16",
        tokens=8192,
        tiny=_TINY_WRITER,
    ),
    "modernbert-base": Shape(
        config={
            "model_type": "modernbert",
            "vocab_size": 50368,
            "hidden_size": 768,
            "intermediate_size": 1152,
            "num_hidden_layers": 22,
            "num_attention_heads": 12,
            "max_position_embeddings": 8192,
            "global_attn_every_n_layers": 3,
            "local_attention": 128,
        },
        generates=False,
        published="float32",
        tokens=16384,
        tiny=_TINY | {"local_attention": 8, **dict.fromkeys(_MARKS, 0)},
    ),
    "bert-base": Shape(
        config={
            "model_type": "bert",
            "vocab_size": 30522,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        generates=False,
        published="float32",
        tokens=16384,
        tiny=_TINY,
    ),
}


@dataclass(frozen=True)
class Way:
    """How a step is computed."""

    name: str
    family: Literal["ours", "trainer", "products"]
    recompute: Literal["own", "selective", "layers"] = "own"
    """Activations that are made again in the backward pass: what the plan says (Trainer: none), or these."""
    kernel: Literal["own", "triton"] = "own"
    """What multiplies by int8 codes, of ours: what the plan says, or this."""
    row_by_row: bool = False
    """Whether each row of a step is a micro-batch of its own."""
    embeddings: bool = False
    """Whether embeddings and output layer are held in int8 too, of ours: that is another experiment."""
    passing: bool = False
    """Whether layers lie in the machine's memory and pass through two slots, of ours."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Modules of lowres_ft that not every version of it has."""
        needed = {"recompute": self.recompute != "own", "fused": self.kernel == "triton", "streaming": self.passing}
        return tuple(name for name, yes in needed.items() if yes and self.family == "ours")


OURS = Way("ours", "ours")
SELECTIVE = Way("ours selective", "ours", recompute="selective")
LAYERS = Way("ours layers", "ours", recompute="layers")
TRITON = Way("ours triton", "ours", kernel="triton")
TRAINER = Way("trainer", "trainer")
CHECKPOINTING = Way("trainer checkpointing", "trainer", recompute="layers")
PRODUCTS = Way("products", "products")
PASSING = Way("ours layers, row by row, passing", "ours", recompute="layers", row_by_row=True, passing=True)
OUR_LADDER = (
    OURS,
    Way("ours row by row", "ours", row_by_row=True),
    SELECTIVE,
    LAYERS,
    Way("ours layers, row by row", "ours", recompute="layers", row_by_row=True),
    Way("ours row by row, int8 embeddings", "ours", row_by_row=True, embeddings=True),
    Way("ours layers, row by row, int8 embeddings", "ours", recompute="layers", row_by_row=True, embeddings=True),
)
"""What is tried under a cap, the fastest first, until one fits."""
PASSING_LADDER = (
    PASSING,
    Way(f"{PASSING.name}, int8 embeddings", "ours", recompute="layers", row_by_row=True, embeddings=True, passing=True),
)
"""What is tried where less memory is had than the weights take."""
TRAINER_LADDER = (
    TRAINER,
    CHECKPOINTING,
    Way("trainer checkpointing, row by row", "trainer", recompute="layers", row_by_row=True),
)


@dataclass(frozen=True)
class Cell:
    """One figure of the record: a shape trained in a way, or in the first of several that fits under a cap."""

    shape: str
    numbers: Numbers
    length: int
    ways: tuple[Way, ...]
    cap: float | None = None
    """GiB; None for all that the GPU has."""

    @property
    def key(self) -> str:
        """Its name in the record."""
        capped = "" if self.cap is None else f" in {self.cap:g} GiB"
        return f"{self.shape} {self.numbers} {self.length} {self.ways[0].name}{capped}"


@dataclass(frozen=True)
class Job:
    """What a process of its own measures: one way of a cell."""

    shape: str
    numbers: Numbers
    length: int
    way: Way
    cap: float | None = None
    device: str = "cuda"
    tiny: bool = False
    warmup: int = 3
    steps: int = 10
    seed: int = 7

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Job":
        """The job that `dataclasses.asdict` took apart."""
        return cls(**dict(fields) | {"way": Way(**fields["way"])})

    @property
    def key(self) -> tuple[object, ...]:
        """What it computes, whatever it is called: where a step has one row, there is no cut by rows."""
        way = self.way
        return (way.family, way.recompute, way.kernel, way.row_by_row and self.rows > 1, way.embeddings, way.passing)

    @property
    def row(self) -> int:
        """Tokens of a row."""
        return _TINY_LENGTH[self.length] if self.tiny else self.length

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return max(1, (_TINY_TOKENS if self.tiny else SHAPES[self.shape].tokens) // self.row)

    @property
    def config(self) -> dict[str, Any]:
        """The config of the model."""
        shape = SHAPES[self.shape]
        return {**shape.config, **(shape.tiny if self.tiny else {})}


def cells(shapes: tuple[str, ...], caps: tuple[float | None, ...] | None, *, few: bool) -> list[Cell]:
    """What to measure, the essential first; each cell once. Without `caps`: none, and then the usual ones."""
    wanted = [*_essential(caps), *(() if few else _all(caps))]
    seen = {cell.key: cell for cell in reversed(wanted) if cell.shape in shapes}
    order = {cell.key: at for at, cell in reversed(list(enumerate(wanted)))}
    return sorted(seen.values(), key=lambda cell: order[cell.key])


def _essential(caps: tuple[float | None, ...] | None) -> Iterator[Cell]:
    """The goals, the smallest language model, and what the 8B shape needs."""
    large, small = "llama-3.1-8b", "qwen3-0.6b"
    if caps is None or None in caps:
        yield Cell(large, "int8", 2048, (PRODUCTS,))
        yield from _ways(large, "int8", 2048)
    if caps is None:
        yield from _capped(large, "int8", 2048, GOAL_CAP)
        yield Cell(large, "nf4", 512, PASSING_LADDER, PASSING_CAP)
        yield Cell(large, "int8", 512, PASSING_LADDER, PASSING_CAP)
    if caps is None or None in caps:
        for numbers in _NUMBERS:
            yield from (Cell(small, numbers, 2048, (way,)) for way in (OURS, TRAINER))
    for cap in CAPS if caps is None else caps:
        if cap is not None:
            for numbers in ("int8", "nf4"):
                yield from _capped(large, numbers, 2048, cap)


_NUMBERS: tuple[Numbers, ...] = ("bf16", "int8", "nf4")


def _all(caps: tuple[float | None, ...] | None) -> Iterator[Cell]:
    """Every shape, in every number, at every length that it can take."""
    for cap in (None, *CAPS) if caps is None else caps:
        for name, shape in SHAPES.items():
            for numbers in _NUMBERS:
                for length in (length for length in LENGTHS if length <= shape.positions):
                    yield from _ways(name, numbers, length) if cap is None else _capped(name, numbers, length, cap)


def _ways(shape: str, numbers: Numbers, length: int) -> Iterator[Cell]:
    ways = [OURS, LAYERS, SELECTIVE, *[TRITON] * (numbers == "int8"), TRAINER, CHECKPOINTING]
    yield from (Cell(shape, numbers, length, (way,)) for way in ways)


def _capped(shape: str, numbers: Numbers, length: int, cap: float) -> Iterator[Cell]:
    yield from (Cell(shape, numbers, length, ladder, cap) for ladder in (OUR_LADDER, TRAINER_LADDER))
