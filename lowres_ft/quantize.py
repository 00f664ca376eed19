"""int8 weights in bitsandbytes' format: row-wise absmax codes, quantized layer by layer as the file is read."""

from typing import Any

from torch import Tensor, nn

from lowres_ft import libraries
from lowres_ft.errors import ModelError


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

    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(keep))
    return {"quantization_config": config, "device_map": {"": device}}


def codes(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Codes (outputs, inputs) int8 and scale (outputs,) fp32 of a quantized layer; None for any other module.

    bitsandbytes keeps the absolute maximum of each row; code 127 stands for it.
    """
    absmax = getattr(getattr(module, "weight", None), "SCB", None)
    if absmax is None:
        return None
    weight = module.weight.data
    assert isinstance(weight, Tensor)
    return weight, absmax.float() / 127
