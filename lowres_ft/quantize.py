"""int8 and nf4 weights in bitsandbytes' formats, quantized layer by layer as the file is read."""

from typing import Any

from torch import Tensor, nn

from lowres_ft import libraries
from lowres_ft.errors import ModelError
from lowres_ft.profiles import Profile
from lowres_ft.storage import NESTED_BLOCK, NF4_BLOCK, Int8, Nested, Nf4, Storage


def loading_options(quantize: str, device: str, keep: tuple[str, ...]) -> dict[str, Any]:
    """Options of `from_pretrained` that quantize every linear layer but those in `keep`.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if quantize == "none":
        return {}
    try:
        libraries.bitsandbytes()
    except ImportError as error:
        raise ModelError(
            f"model.quantize={quantize} needs bitsandbytes, which is not installed", hint="pip install bitsandbytes"
        ) from error
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(**config_fields(quantize), llm_int8_skip_modules=list(keep))
    return {"quantization_config": config, "device_map": {"": device}}


def config_fields(quantize: str) -> dict[str, Any]:
    """What transformers' BitsAndBytesConfig says of a format."""
    if quantize == "int8":
        return {"load_in_8bit": True}
    return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


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


def storage(module: nn.Module) -> Storage | None:
    """The weight of a quantized layer; None for any other module.

    bitsandbytes keeps the absolute maximum of each int8 row, for which code 127 stands, and of each nf4 block. Taking
    the weights over at once also keeps its nf4 layer from repacking them in `eval`, after which its backward pass skips
    the base.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if (absmax := getattr(weight, "SCB", None)) is not None:
        return Int8(weight.data, absmax)
    if (state := getattr(weight, "quant_state", None)) is not None:
        return _nf4(weight.data, state)
    return None


def _nf4(packed: Tensor, state: Any) -> Nf4:
    """A base that was quantized elsewhere may hold its absolute maxima in fp32, or another 4-bit format."""
    if state.quant_type != "nf4" or state.blocksize != NF4_BLOCK:
        raise ModelError(f"the base holds {state.quant_type} weights in blocks of {state.blocksize}, not nf4 of 64")
    if not state.nested:
        return Nf4(packed, state.absmax, state.shape)
    inner = state.state2
    assert inner.blocksize == NESTED_BLOCK
    return Nf4(packed, state.absmax, state.shape, Nested(inner.absmax, inner.code, state.offset))
