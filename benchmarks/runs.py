"""Runs by which constants of memory and time are fitted, and others by which what is told is judged."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """A whole run on a base with random weights."""

    shape: str
    task: str
    length: int
    steps: int
    changes: tuple[str, ...] = ()
    dtype: str = "auto"
    """In which it computes; `auto` is what this machine would take."""

    @property
    def settings(self) -> tuple[str, ...]:
        """All that differs from a plain recipe."""
        return (f"train.steps={self.steps}", *self.changes, f"model.dtype={self.dtype}")

    @property
    def name(self) -> str:
        """Shape, task, length, steps, dtype and changes in one line."""
        return " ".join([self.shape, self.task, str(self.length), f"x{self.steps}", self.dtype, *self.changes])

    @property
    def key(self) -> str:
        """The same as the name of a folder."""
        return re.sub(r"[^A-Za-z0-9.=-]+", "_", self.name)


_INT8, _NF4, _FULL = "model.quantize=int8", "model.quantize=nf4", "method={kind: full}"
_EMBEDDINGS, _FP32, _BF16 = "model.quantize_embeddings=true", "float32", "bfloat16"
FITTED = (
    Run("minilm", "classification", 128, 80, (), _BF16),
    Run("minilm", "classification", 512, 20, ("budget.recompute=layers",), _BF16),
    Run("bert-base", "classification", 64, 30, (_INT8,), _BF16),
    Run("bert-base", "ner", 96, 20, (_NF4, "train.batch_size=16"), _FP32),
    Run("bert-base", "classification", 128, 16, (_FULL, "train.batch_size=16"), _BF16),
    Run("bert-mini", "classification", 32, 120, (), _FP32),
    Run("xlm-r-minilm", "ner", 128, 30, (_INT8, _EMBEDDINGS), _BF16),
    Run("modernbert-small", "classification", 256, 20, (), _BF16),
    Run("smollm2", "chat", 128, 12, (_INT8, "train.batch_size=16"), _BF16),
    Run("smollm2", "chat", 256, 12, (_NF4, "budget.recompute=selective", "train.batch_size=8"), _BF16),
    Run("llama-small", "chat", 256, 20, (), _FP32),
    Run("qwen3-small", "classification", 128, 20, ("method.rank=64",), _BF16),
)
"""Each names its dtype, so that machines agree on what is run."""
BOUND = (
    Run("minilm", "classification", 128, 20, ("budget.memory=690MiB",), _BF16),
    Run("bert-mini", "classification", 32, 40, ("budget.memory=660MiB",), _FP32),
    Run("bert-base", "classification", 64, 10, (_INT8, "budget.memory=950MiB"), _BF16),
    Run("modernbert-small", "classification", 256, 8, ("budget.memory=800MiB", "train.batch_size=8"), _BF16),
    Run("smollm2", "chat", 128, 5, (_INT8, "train.batch_size=8", "budget.memory=1200MiB"), _BF16),
    Run("llama-small", "chat", 256, 6, ("train.batch_size=8", "budget.memory=1000MiB"), _FP32),
    Run("qwen3-small", "classification", 128, 8, ("train.batch_size=16", "budget.memory=1100MiB"), _BF16),
)
"""Such as are held to a bound, where malloc keeps less."""
JUDGED = (
    Run("minilm", "classification", 96, 40, ("method.rank=8",)),
    Run("minilm", "ner", 32, 120),
    Run("minilm", "classification", 256, 20, ("budget.recompute=layers",)),
    Run("bert-mini", "classification", 256, 40),
    Run("bert-mini", "classification", 64, 100, (_FULL,)),
    Run("bert-base", "classification", 48, 20, (_INT8,)),
    Run("distilbert", "classification", 128, 20, ("train.batch_size=16",)),
    Run("roberta-small", "classification", 64, 30, ("method={kind: dora}",)),
    Run("roberta-small", "ner", 128, 20, (_NF4,)),
    Run("roberta-base", "ner", 64, 10, ("budget.recompute=layers", "train.batch_size=8"), _FP32),
    Run("xlm-r-minilm", "classification", 128, 20),
    Run("deberta-small", "classification", 64, 20),
    Run("modernbert-small", "classification", 128, 20),
    Run("modernbert-small", "ner", 512, 12, ("method={kind: dora}", _NF4, "train.batch_size=4")),
    Run("modernbert-base", "classification", 96, 10, (_INT8, _EMBEDDINGS, "train.batch_size=8")),
    Run("llama-small", "chat", 128, 20, (_INT8,)),
    Run("llama-small", "classification", 64, 40),
    Run("smollm2", "chat", 64, 12, ("train.batch_size=8",)),
    Run("smollm2", "classification", 64, 10, ("method={kind: ia3}", "train.batch_size=8")),
    Run("qwen3-small", "chat", 64, 12, (_NF4, "train.batch_size=16")),
    Run("gemma3-small", "chat", 128, 10, (_INT8, _EMBEDDINGS, "train.batch_size=8")),
    Run("gemma3-small", "classification", 128, 20, ("method.targets=attention",)),
)
"""Most compute in what users of this machine would have."""
