"""lowres-ft: fine-tune small pretrained models on small machines, and share what comes of it.

    from lowres_ft import load_recipe, run
    bundle = run(load_recipe("sentiment-lora", ["train.epochs=1"]))

What is named here is imported when it is first asked for, and heavy libraries with `run` and its kin.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from lowres_ft import allocator
from lowres_ft.errors import LowresError

# OpenMP's threads spin while they wait. Where another program wants a core, spinning briefly is 1.6 times as fast,
# and no slower where none does (MiniLM, 2 threads). It is read when PyTorch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# oneDNN and PyTorch each keep the products of the last 1,024 shapes, of which a step with texts of other lengths makes
# new ones. 64 of each take half a gigabyte less on short texts, and no more time; it takes both (benchmarks/NOTES.md).
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
allocator.ask_for_huge_pages()
# Arrow's own allocator maps a gigabyte at its first byte, which counts as data of the process (RLIMIT_DATA).
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

if TYPE_CHECKING:
    from lowres_ft.bundle import Bundle, open_bundle
    from lowres_ft.merging import merge
    from lowres_ft.pipeline import run
    from lowres_ft.prediction import Predictor, evaluate_bundle
    from lowres_ft.recipe import Recipe, load_recipe

__version__ = "0.1.0"
__all__ = [
    "Bundle",
    "LowresError",
    "Predictor",
    "Recipe",
    "evaluate_bundle",
    "load_recipe",
    "merge",
    "open_bundle",
    "run",
]
# No module is called like a public function: importing the module would put itself in the function's place.
_HOMES = {
    "Bundle": "bundle",
    "open_bundle": "bundle",
    "merge": "merging",
    "run": "pipeline",
    "Predictor": "prediction",
    "evaluate_bundle": "prediction",
    "Recipe": "recipe",
    "load_recipe": "recipe",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lowres_ft' has no attribute '{name}'")
    return getattr(importlib.import_module(f"lowres_ft.{_HOMES[name]}"), name)
