"""What any run of a recipe takes at least, told in a moment and without a heavy library.

Libraries take what was fitted. Weights take what the headers of their files say, in the form in which a recipe lets
them be held by a processor: those of words, and where layers cannot pass through room for two of them, those of layers.
Nothing is counted that some plan could do without, so that no run is refused here which could be told to fit.
"""

import os
import re
import sys
from collections.abc import Iterator
from ctypes.util import find_library
from math import prod
from pathlib import Path

from lowres_ft import assets, bases, changes, foreign, limits, tables
from lowres_ft.errors import LowresError, ModelError
from lowres_ft.recipe import Recipe
from lowres_ft.sizes import parse_bytes, show_bytes

_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # NVIDIA's, Windows' in its Linux, and AMD's
FILE_ELEMENT = 4  # bytes of a weight while it is read: files may hold fp32, whatever is kept of it
_SINGLE = 4  # bytes of a weight in fp32
_LAYER = re.compile(r"\.\d+\.")
_WORDS = re.compile(r"embed|\bw[tp]e\b")
_OTHER = re.compile(r"vision|visual|audio|image")  # parts that a model of texts may leave out
_CODE = {"int8": 1.0, "nf4": 0.5}  # bytes of a quantized weight, its scales left out
_GRADIENT = 4  # bytes, in fp32
_MOMENTS = {"adamw": 8, "adamw8bit": 2}


def libraries(device: str) -> int:
    """Bytes that the libraries of a bound run take on a device; where it is `auto`, where they take least."""
    fitted = tables.read("memory")
    either = ("bound", "cuda") if _may_have_gpu() else ("bound",)
    kinds = either if device == "auto" else ("bound" if device == "cpu" else "cuda",)
    return min(int(fitted[kind]["libraries"]) for kind in kinds)


def require_libraries(recipe: Recipe, device: str = "auto") -> None:
    """See, without a heavy library, that a recipe's budget holds what libraries take.

    Raises:
        ModelError: It does not.
    """
    most, needed = _bound(recipe), libraries(device)
    if most is not None and most < needed:
        raise ModelError(
            f"budget.memory: {show_bytes(most)} are less than the {show_bytes(needed)} that libraries alone take, "
            "before any weight",
            hint="Give it more; `lowres-ft plan` tells how much a run needs. Or leave it out, and there is no bound.",
        )


def require(recipe: Recipe, device: str = "auto") -> None:
    """See, without a heavy library, that a recipe's budget holds what libraries take, and on a processor weights too.

    Raises:
        ModelError: It does not; the hint lists changes and what each saves, as far as can be told so.
    """
    require_libraries(recipe, device)
    most = _bound(recipe)
    if most is None or (device != "cpu" and _may_have_gpu()):
        return
    weights = Weights.of(recipe)
    if most < (needed := weights.needed(recipe)):
        parts = libraries("cpu"), weights.bytes(recipe)
        taken, read, spare = map(show_bytes, (*parts, needed - sum(parts)))
        raise ModelError(
            f"this run needs {show_bytes(needed)} at least, and may take {show_bytes(most)}: libraries take {taken}, "
            f"weights {read} while they are read, and {spare} are spared",
            hint=_remedies(weights, recipe, needed, most),
        )


def _bound(recipe: Recipe) -> int | None:
    """Bytes that the recipe sets as a bound."""
    told = recipe.budget.memory
    return None if told in (None, "auto") else parse_bytes(str(told))


def _remedies(weights: "Weights", recipe: Recipe, needed: int, most: int) -> str:
    """What changes save by themselves, and whether that is enough."""
    several = changes.frugal(recipe, recipe.model.dtype, "cpu")
    found = [(needed - weights.needed(changed), change) for change, changed in several]
    found = sorted((one for one in found if one[0] > 0), reverse=True)
    listed = "".join(f"{change} saves {show_bytes(saved)}. " for saved, change in found)
    enough = bool(found) and found[0][0] >= needed - most
    other = "" if enough else "Use a smaller base, or give it more. "
    return f"{listed}{other}`lowres-ft plan` tells all that the run needs."


class Weights:
    """The weights of a base that lies here, by name and shape; none of one that does not."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    @classmethod
    def of(cls, recipe: Recipe) -> "Weights":
        """Those of a recipe's base, if it need not be fetched and is sound."""
        folder = _folder(recipe.model.base)
        try:
            names = [] if folder is None else bases.weight_files(folder)
            return cls({name: shape for file in names for name, shape in _header(Path(folder or "", file))})
        except (LowresError, OSError, ValueError, KeyError, TypeError, AttributeError):  # for those to tell who read it
            return cls({})

    def needed(self, recipe: Recipe) -> int:
        """Bytes that a run has to be given."""
        return limits.given(libraries("cpu") + self.bytes(recipe), "cpu")

    def bytes(self, recipe: Recipe) -> int:
        """Bytes that weights take at least: the largest while it is read, or what trains all of them."""
        needed = [(name, shape) for name, shape in self.shapes.items() if _is_needed(name, recipe)]
        held = sum(_bytes_each(name, shape, recipe) * prod(shape) for name, shape in needed)
        if recipe.method.trains_base:
            best = 0 if recipe.data.validation is None else _SINGLE  # a copy of the best step
            return int(held * (1 + (_GRADIENT + _MOMENTS[recipe.train.optimizer] + best) / _SINGLE))
        stored = (prod(shape) * min(1.0, _bytes_each(name, shape, recipe)) for name, shape in needed)
        return int(held + FILE_ELEMENT * max(stored, default=0))


def _is_needed(name: str, recipe: Recipe) -> bool:
    """Whether each plan of a recipe holds a tensor."""
    if _OTHER.search(name):
        return False
    if not _LAYER.search(name):
        return _WORDS.search(name) is not None
    method = recipe.method
    return method.trains_base or method.corrects_quantization or recipe.budget.offload == "none"


def _bytes_each(name: str, shape: tuple[int, ...], recipe: Recipe) -> float:
    """Bytes by which one weight of a tensor is held."""
    spec = recipe.model
    if recipe.method.trains_base:
        return _SINGLE
    if spec.quantize != "none" and len(shape) > 1 and (_LAYER.search(name) or spec.quantize_embeddings):
        return _CODE[spec.quantize]
    return _SINGLE if spec.dtype == "float32" else 2


def _folder(base: str) -> Path | None:
    """Where a base lies, if it need not be fetched."""
    if base.startswith("starter:"):
        try:
            folder = assets.starter(base.removeprefix("starter:")).asset.folder
        except LowresError:
            return None
    else:
        folder = Path(os.path.expanduser(base))
    return folder if os.path.isdir(folder) else None


def _header(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of a safetensors file.

    Raises:
        ValueError: It is none.
    """
    with path.open("rb") as file:
        for name, entry in foreign.read_header(file).items():
            yield name, tuple(map(int, entry["shape"]))


def _may_have_gpu() -> bool:
    """Whether a driver of a GPU is here, as far as can be seen without a heavy library; a Mac has one."""
    if sys.platform == "win32":
        return find_library("nvcuda") is not None
    return sys.platform == "darwin" or any(map(os.path.exists, _GPU_DRIVERS))
