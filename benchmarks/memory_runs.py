"""Runs by which the memory model is fitted, and others by which it is judged."""

import re
from dataclasses import dataclass

_IN_HEAP = ("bert-mini", "minilm", "xlm-r-minilm", "deberta-small", "llama-small")
"""Shapes whose tensors lie in malloc's heap (`allocator.maps`), which grows with each new size of a step."""
_STEPS = "train.steps=20"


@dataclass(frozen=True)
class Run:
    """A run of a few steps on a base with random weights."""

    shape: str
    task: str
    length: int
    changes: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    """In which it computes; `auto` is what this machine would take."""

    @property
    def settings(self) -> tuple[str, ...]:
        """All that differs from a plain recipe."""
        longer = (_STEPS,) if self.shape in _IN_HEAP else ()
        return (*longer, *self.changes, f"model.dtype={self.dtype}")

    @property
    def name(self) -> str:
        """Shape, task, length, dtype and changes in one line."""
        return " ".join([self.shape, self.task, str(self.length), self.dtype, *self.changes])

    @property
    def key(self) -> str:
        """The same as the name of a file."""
        return re.sub(r"[^A-Za-z0-9.=-]+", "_", self.name)


_INT8, _NF4, _FP32 = "model.quantize=int8", "model.quantize=nf4", "float32"
FITTED = (
    Run("minilm", "classification", 128),
    Run("minilm", "classification", 512, ("budget.recompute=layers",)),
    Run("bert-base", "classification", 64, (_INT8,)),
    Run("bert-base", "ner", 256, (_NF4,), _FP32),
    Run("bert-base", "classification", 128, ("method={kind: full}",)),
    Run("bert-mini", "classification", 32, (), _FP32),
    Run("xlm-r-minilm", "ner", 128, (_INT8, "model.quantize_embeddings=true")),
    Run("modernbert-small", "classification", 256),
    Run("smollm2", "chat", 128, (_INT8,)),
    Run("smollm2", "chat", 256, (_NF4, "budget.recompute=selective", "train.batch_size=8")),
    Run("llama-small", "chat", 256, (), _FP32),
    Run("qwen3-small", "classification", 128, ("method.rank=64",)),
)
JUDGED = (
    Run("minilm", "classification", 512, ("budget.recompute=layers", "train.steps=16")),
    Run("bert-mini", "classification", 32, ("train.steps=256",), _FP32),
    Run("minilm", "classification", 256),
    Run("minilm", "classification", 128, ("method.rank=4",), _FP32),
    Run("minilm", "classification", 48, ("train.steps=100",), _FP32),
    Run("minilm", "ner", 32, ("method={kind: full}",), _FP32),
    Run("bert-mini", "classification", 512),
    Run("bert-base", "classification", 512, (_INT8, "budget.recompute=selective", "train.batch_size=4")),
    Run("distilbert", "classification", 128, (_INT8,), _FP32),
    Run("roberta-base", "ner", 256, ("budget.recompute=layers",), _FP32),
    Run("bert-base", "classification", 24, ("train.steps=32",), _FP32),
    Run("roberta-small", "classification", 64, ("method={kind: dora}",)),
    Run("xlm-r-minilm", "ner", 256, (_INT8, "method={kind: ia3}")),
    Run("deberta-small", "classification", 128, (_INT8,)),
    Run("modernbert-base", "classification", 128, (_INT8, "model.quantize_embeddings=true")),
    Run("modernbert-small", "ner", 512, ("method={kind: dora}", _NF4)),
    Run("llama-small", "classification", 64, (_INT8,), _FP32),
    Run("smollm2", "chat", 64, ("train.batch_size=8",), _FP32),
    Run("smollm2", "chat", 512, (_INT8, "budget.recompute=layers")),
    Run("smollm2", "classification", 128, ("method={kind: ia3}",)),
    Run("qwen3-small", "chat", 128, (_NF4,), _FP32),
    Run("gemma3-small", "chat", 256, (_INT8, "model.quantize_embeddings=true")),
    Run("gemma3-small", "classification", 128, ("method.targets=attention",)),
)
