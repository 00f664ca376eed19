"""What is set before PyTorch is imported, and left alone where it is set already."""

import os
import subprocess
import sys

SETTINGS = {
    "GOMP_SPINCOUNT": "1000",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
    "THP_MEM_ALLOC_ENABLE": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}


def imported(**environment: str) -> list[str]:
    """The settings after the package is imported, and whether PyTorch was."""
    code = f"import os, sys, lowres_ft; print(*(os.environ[name] for name in {list(SETTINGS)}), 'torch' in sys.modules)"
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_the_package_sets_them_before_pytorch_is_imported():
    assert imported() == [*SETTINGS.values(), "False"]


def test_what_the_user_set_stays():
    assert imported(LRU_CACHE_CAPACITY="7") == ["1000", "64", "7", "1", "system", "False"]
