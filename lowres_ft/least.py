"""What any run of a recipe takes at least, told in a moment and without a heavy library.

Libraries take what was fitted. Weights take what the headers of their files say, in the form in which a recipe lets
them be held by a processor: those of words, and where layers cannot pass through room for two of them, those of layers.
What is trained comes with its gradient, the optimizer's moments and a copy of the best step. Activations and logits are
not counted, nor is anything that some plan could do without, so that no run is refused here which could be told to fit.
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
from lowres_ft.methods.base import Method
from lowres_ft.recipe import Recipe
from lowres_ft.sizes import parse_bytes, show_bytes

_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # NVIDIA's, Windows' in its Linux, and AMD's
FILE_ELEMENT = 4  # bytes of a weight while it is read: files may hold fp32, whatever is kept of it
_SINGLE = 4  # bytes of a weight in fp32
_LAYER = re.compile(r"\.\d+\.")
_WORDS = re.compile(r"embed|\bw[tp]e\b")
_OTHER = re.compile(r"vision|visual|audio|image")  # parts that a model of texts may leave out
_NO_LINEAR = re.compile(r"expert|router|gate\.weight|norm|bias|posi|conv")  # or held otherwise by some models
_CODE = {"int8": 1.0, "nf4": 0.5}  # bytes of a quantized weight, its scales left out
_GRADIENT = 4  # bytes, in fp32
_MOMENTS = {"adamw": 8, "adamw8bit": 2}
_BESIDE = 1.05  # times what is counted here, that a small run takes


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
            f"weights and what trains them {read}, and {spare} are spared",
            hint=_remedies(weights, recipe, needed, most),
        )


def _bound(recipe: Recipe) -> int | None:
    """Bytes that the recipe sets as a bound."""
    told = recipe.budget.memory
    return None if told in (None, "auto") else parse_bytes(str(told))


def _remedies(weights: "Weights", recipe: Recipe, needed: int, most: int) -> str:
    """What changes save by themselves, and which of them bring a run well below what it may take."""
    ways = changes.Ways(recipe.model.dtype, "cpu", weights.needed)
    within = round(most / _BESIDE)
    together = ways.together(recipe, needed, within)
    enough = together.needs <= within
    told = f"{' '.join(together.changes)}{' together' if len(together.changes) > 1 else ''}" if enough else ""
    told = f"With {told} it is {show_bytes(together.needs)} at least" if told else "Use a smaller base, or give it more"
    listed = f"{ways.listed(recipe, needed)}. ".removeprefix(". ")
    return f"{listed}{told}. `lowres-ft plan` tells all that the run needs."


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
        """Bytes that weights take at least: the largest while it is read, or what trains them or an adapter."""
        needed = [(name, shape) for name, shape in self.shapes.items() if _is_needed(name, recipe)]
        best = 0 if recipe.data.validation is None else _SINGLE
        trains = _SINGLE + _GRADIENT + _MOMENTS[recipe.train.optimizer] + best
        if recipe.method.trains_base:
            return trains * sum(prod(shape) for _, shape in needed)
        held = sum(_bytes_each(name, shape, recipe) * prod(shape) for name, shape in needed)
        stored = max((prod(shape) * min(1.0, _bytes_each(name, shape, recipe)) for name, shape in needed), default=0)
        added = self._added(recipe.method)
        return int(held + max(_SINGLE * added + FILE_ELEMENT * stored, trains * added))

    def _added(self, method: Method) -> int:
        """Weights of an adapter, as far as names and shapes tell which tensors are linear layers."""
        found = {name: shape for name, shape in self.shapes.items() if _is_linear(name, shape)}
        linears = {name.removesuffix(".weight"): shape for name, shape in found.items()}
        try:
            chosen = method.choose(list(linears)) if linears else ()
        except ModelError:  # files may call them otherwise than the model does
            return 0
        pairs = [(method.adapter(name), linears[name]) for name in chosen]
        return sum(
            min(adapter.parameters(*shape), adapter.parameters(*reversed(shape)))  # files may hold them transposed
            for adapter, shape in pairs
            if adapter is not None
        )


def _is_needed(name: str, recipe: Recipe) -> bool:
    """Whether each plan of a recipe holds a tensor."""
    if _OTHER.search(name):
        return False
    if not _LAYER.search(name):
        return _WORDS.search(name) is not None
    method = recipe.method
    return method.trains_base or method.corrects_quantization or recipe.budget.offload == "none"


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is sure to be the weight of a linear layer in a stack."""
    inside = _LAYER.search(name) is not None and name.endswith(".weight") and len(shape) == 2
    return inside and not any(other.search(name) for other in (_OTHER, _WORDS, _NO_LINEAR))


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
