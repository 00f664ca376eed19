"""int8 and nf4 weights in bitsandbytes' formats: made from plain ones, or taken over from its layers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowres_ft import libraries
from lowres_ft.errors import ModelError
from lowres_ft.profiles import Profile
from lowres_ft.storage import NESTED_BLOCK, NESTED_CODES, NF4_BLOCK, Int8, Nested, Nf4, Storage

_AT_ONCE = 2**18  # weights: quantizing takes up to 30 bytes for each


def require_library(quantize: str) -> None:
    """Refuse to quantize without bitsandbytes.

    Raises:
        ModelError: It is not installed.
    """
    try:
        libraries.bitsandbytes()
    except ImportError as error:
        raise ModelError(
            f"model.quantize={quantize} needs bitsandbytes, which is not installed", hint="pip install bitsandbytes"
        ) from error


def config_fields(quantize: str) -> dict[str, Any]:
    """What transformers' BitsAndBytesConfig says of a format."""
    if quantize == "int8":
        return {"load_in_8bit": True}
    return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def foreign_config(form: str, keep: Sequence[str]) -> Any:
    """What makes transformers and bitsandbytes quantize every linear layer but those in the modules to `keep`."""
    require_library(form)
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**config_fields(form), llm_int8_skip_modules=list(keep))


def form_of(config: Any) -> str | None:
    """The format in which a base's files hold its weights, by its config; None where they are plain.

    Raises:
        ModelError: It is one that cannot be read.
    """
    held = getattr(config, "quantization_config", None)
    if held is None:
        return None
    fields = held if isinstance(held, dict) else held.to_dict()
    if fields.get("load_in_8bit"):
        return "int8"
    if fields.get("load_in_4bit") and fields.get("bnb_4bit_quant_type") == "nf4":
        return "nf4"
    raise ModelError(
        f"the base is quantized by {fields.get('quant_method')} in a form that is not read",
        hint="Use the base that it was made from.",
    )


def require_widths(profile: Profile, quantize: str) -> None:
    """Refuse, before a weight is read, a base that a format cannot hold.

    Raises:
        ModelError: nf4's blocks do not divide the width of a layer.
    """
    odd = [linear for linear in profile.linears if linear.inputs % NF4_BLOCK] if quantize == "nf4" else []
    if odd:
        more = f" (and {len(odd) - 1} more)" if odd[1:] else ""
        raise ModelError(
            f"model.quantize=nf4 holds weights in blocks of {NF4_BLOCK}, "
            f"which do not divide the {odd[0].inputs} inputs of {odd[0].name}{more}",
            hint="Use model.quantize=int8 or none.",
        )


def quantized(weight: Tensor, form: str) -> Int8 | Nf4:
    """A plain weight (outputs, inputs) in a format, as bitsandbytes' layers would hold it."""
    held = empty(weight.shape, form, weight.device)
    fill(held, weight)
    return held


Make = Callable[..., Tensor]
"""What makes a tensor of a dtype and so many elements each way, whose values do not matter."""


def empty(shape: torch.Size, form: str, device: torch.device) -> Int8 | Nf4:
    """Room for a weight (outputs, inputs) in a format."""
    return held_in(shape, form, lambda dtype, *sizes: torch.empty(sizes, dtype=dtype, device=device))


def held_in(shape: torch.Size, form: str, room: Make) -> Int8 | Nf4:
    """The same, of tensors that `room` makes."""
    if form == "int8":
        return Int8(room(torch.int8, *shape), room(torch.float32, shape[0]))
    blocks = shape.numel() // NF4_BLOCK
    scale = room(torch.float32, -(-blocks // NESTED_BLOCK))
    nested = Nested(scale, room(torch.float32, NESTED_CODES), room(torch.float32))
    return Nf4(room(torch.uint8, shape.numel() // 2, 1), room(torch.uint8, blocks), shape, nested)


def fill(held: Int8 | Nf4, weight: Tensor) -> None:
    """Quantize a plain weight into the room that was made for it."""
    if isinstance(held, Int8):
        _fill_int8(held, weight)
    else:
        _fill_nf4(held, weight)


def _fill_int8(held: Int8, weight: Tensor) -> None:
    functional = libraries.bitsandbytes().functional
    for rows in _slices(weight):
        part = weight[rows].to(torch.float16).contiguous()  # which bitsandbytes quantizes from
        held.weight[rows], held.absmax[rows], _ = functional.int8_vectorwise_quant(part)


def _fill_nf4(held: Nf4, weight: Tensor) -> None:
    functional = libraries.bitsandbytes().functional
    absmax = torch.empty(len(held.absmax), dtype=torch.float32, device=weight.device)
    packed, by_row = held.weight.view(len(weight), -1), absmax.view(len(weight), -1)
    for rows in _slices(weight):
        part, state = functional.quantize_4bit(weight[rows].contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
        packed[rows], by_row[rows] = part.view_as(packed[rows]), state.absmax.view_as(by_row[rows])
    held.offset.copy_(absmax.mean())
    maxima, state = functional.quantize_blockwise(absmax - held.offset, blocksize=NESTED_BLOCK)
    for room, found in ((held.absmax, maxima), (held.scale, state.absmax), (held.table, state.code)):
        room.copy_(found)


def _slices(weight: Tensor) -> Iterator[slice]:
    """Rows that are quantized at once, so that the memory that this takes does not grow with the weight."""
    step = max(1, _AT_ONCE // weight.shape[1])
    return (slice(first, first + step) for first in range(0, len(weight), step))


def parameter(held: Int8 | Nf4) -> nn.Parameter:
    """A quantized weight in the place of a plain one, until a layer of ours takes it over."""
    found = nn.Parameter(held.weight, requires_grad=False)
    found.held = held  # type: ignore[attr-defined]
    return found


def storage(module: nn.Module) -> Storage | None:
    """The weight of a quantized layer, ours or bitsandbytes'; None for any other module.

    bitsandbytes keeps the absolute maximum of each int8 row, for which code 127 stands, and of each nf4 block. Taking
    the weights over at once also keeps its nf4 layer from repacking them in `eval`, after which its backward pass skips
    the base.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    held = getattr(weight, "held", None)
    if isinstance(held, Storage):
        return held
    if (absmax := getattr(weight, "SCB", None)) is not None:
        return Int8(weight.data, absmax)
    if (state := getattr(weight, "quant_state", None)) is not None:
        return _taken(weight.data, state)
    return None


def _taken(packed: Tensor, state: Any) -> Nf4:
    """A base that was quantized elsewhere may hold its absolute maxima in fp32, or another 4-bit format."""
    if state.quant_type != "nf4" or state.blocksize != NF4_BLOCK:
        raise ModelError(f"the base holds {state.quant_type} weights in blocks of {state.blocksize}, not nf4 of 64")
    if not state.nested:
        return Nf4(packed, state.absmax, state.shape)
    inner = state.state2
    assert inner.blocksize == NESTED_BLOCK
    return Nf4(packed, state.absmax, state.shape, Nested(inner.absmax, inner.code, state.offset))
