"""What any run of a recipe takes at least, told in a moment and without a heavy library.

Libraries take what was fitted. Weights take what the headers of their files say, in the form in which a recipe lets
them be held by a processor: those of words, and all layers or, where they can pass, the room for two of them. What is
trained comes with its gradient, the optimizer's moments and a copy of the best step. Activations and logits are not
counted, nor is anything that some plan could do without, so that no run is refused here which could be told to fit.
"""

import os
import sys
from ctypes.util import find_library
from math import prod

from lowres_ft import changes, headers, limits, outside, tables
from lowres_ft.errors import ModelError
from lowres_ft.headers import Outline
from lowres_ft.methods.base import Method
from lowres_ft.recipe import Recipe
from lowres_ft.sizes import parse_bytes, show_bytes

FILE_ELEMENT = 4  # bytes of a weight while it is read: files may hold fp32, whatever is kept of it
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # NVIDIA's, Windows' in its Linux, and AMD's
_SINGLE = 4  # bytes of a weight in fp32
_CODE = {"int8": 1.0, "nf4": 0.5}  # bytes of a quantized weight, its scales left out
_GRADIENT = 4  # bytes, in fp32
_MOMENTS = {"adamw": 8, "adamw8bit": 2}
_MARGIN = 1.05  # times what is told here, that a run may take which is advised


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
    most, needed = _bound(recipe, device), libraries(device)
    if most is not None and most < needed:
        by = outside.named(most)
        out = "" if by else " Or leave it out, and there is no bound."
        raise ModelError(
            f"budget.memory: {show_bytes(most)}{by} are less than the {show_bytes(needed)} that libraries alone take, "
            "before any weight",
            hint=f"Give it more; `lowres-ft plan` tells how much a run needs.{out}",
        )


def require(recipe: Recipe, device: str = "auto") -> None:
    """See, without a heavy library, that a recipe's budget holds what libraries take, and on a processor weights too.

    Raises:
        ModelError: It does not; the hint lists changes and what each saves, as far as can be told so.
    """
    require_libraries(recipe, device)
    most = _bound(recipe, device)
    if most is None or not on_processor(device):
        return
    outline = Outline.of(recipe.model.base)
    if most < (needed := given(outline, recipe)):
        parts = libraries("cpu"), tensors(outline, recipe)
        taken, read, spare = map(show_bytes, (*parts, needed - sum(parts)))
        may = f"{show_bytes(most)}{outside.named(most)}"
        raise ModelError(
            f"this run needs {show_bytes(needed)} at least, and may take {may}: libraries take {taken}, "
            f"weights, with what is read or trained beside them, {read}, and {spare} are spared",
            hint=_hint(outline, recipe, needed, most),
        )


def _bound(recipe: Recipe, device: str) -> int | None:
    """Bytes that a run may take, as its recipe says, or the system where that is less and a processor computes."""
    told = recipe.budget.memory
    if told is None:
        return None
    most = sys.maxsize if told == "auto" else parse_bytes(told)
    return outside.within(most) if on_processor(device) else most


def _hint(outline: Outline, recipe: Recipe, needed: int, most: int) -> str:
    """What changes save by themselves, and which of them bring a run to what it may take."""
    ways = changes.Ways(recipe.model.dtype, "cpu", lambda changed: given(outline, changed))
    together = ways.together(recipe, needed, round(most / _MARGIN))
    told = "Use a smaller base, or give it more"
    if together.needs <= most:
        told = f"With {' '.join(together.changes)} it needs {show_bytes(together.needs)} at least"
        told += ", which may just not be enough" if together.needs > most / _MARGIN else ""
    listed = ways.listed(recipe, needed)
    return f"{listed}{'. ' if listed else ''}{told}. `lowres-ft plan` tells all that the run needs."


def given(outline: Outline, recipe: Recipe) -> int:
    """Bytes that a run has to be given at least."""
    return limits.given(libraries("cpu") + tensors(outline, recipe), "cpu")


def tensors(outline: Outline, recipe: Recipe) -> int:
    """Bytes of weights at least, and beside them of the largest while it is read or of all that is trained."""
    best = 0 if recipe.data.validation is None else _SINGLE  # a copy of the best step
    trains = _SINGLE + _GRADIENT + _MOMENTS[recipe.train.optimizer] + best
    if recipe.method.trains_base:
        return trains * (headers.elements(outline.words) + sum(map(headers.elements, outline.layers)))
    words = _bytes_of_words(recipe)
    in_layers = [(_bytes_in_layer(shape, recipe), prod(shape)) for layer in outline.layers for shape in layer.values()]
    largest = max([count * min(1.0, each) for each, count in in_layers], default=0.0)
    largest = max([largest, *(prod(shape) * min(1.0, words) for shape in outline.words.values())])
    if recipe.method.corrects_quantization or recipe.budget.offload == "none":
        held = sum(each * count for each, count in in_layers)
    else:
        held = sum(sorted(_passing(layer, recipe) for layer in map(headers.linears, outline.layers))[-2:])
    held += words * headers.elements(outline.words)
    added = _added(outline, recipe.method)
    return int(held + max(_SINGLE * added + FILE_ELEMENT * largest, trains * added))


def _passing(layer: headers.Shapes, recipe: Recipe) -> float:
    """Bytes of the linear layers in a layer that passes."""
    return sum(_bytes_in_layer(shape, recipe) * prod(shape) for shape in layer.values())


def _added(outline: Outline, method: Method) -> int:
    """Weights of an adapter at least."""
    linears = outline.linears
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


def _bytes_in_layer(shape: tuple[int, ...], recipe: Recipe) -> float:
    """Bytes by which one weight of a frozen layer is held."""
    quantized = recipe.model.quantize != "none" and len(shape) > 1
    return _CODE[recipe.model.quantize] if quantized else _bytes_as_they_are(recipe)


def _bytes_of_words(recipe: Recipe) -> float:
    """Bytes by which one weight of a frozen embedding is held."""
    return _CODE["int8"] if recipe.model.quantize_embeddings else _bytes_as_they_are(recipe)


def _bytes_as_they_are(recipe: Recipe) -> float:
    return _SINGLE if recipe.model.dtype == "float32" else 2


def on_processor(device: str) -> bool:
    """Whether it is the processor that computes, as far as can be seen."""
    return device == "cpu" or (device == "auto" and not _may_have_gpu())


def _may_have_gpu() -> bool:
    """Whether a driver of a GPU is here, as far as can be seen without a heavy library; a Mac has one."""
    if sys.platform == "win32":
        return find_library("nvcuda") is not None
    return sys.platform == "darwin" or any(map(os.path.exists, _GPU_DRIVERS))
