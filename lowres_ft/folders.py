"""Models without adapters as transformers folders, as any other program writes and loads them."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lowres_ft import profiles, quantize
from lowres_ft.errors import ModelError
from lowres_ft.model import Adapted
from lowres_ft.tasks import _templates
from lowres_ft.tasks.base import Task


def save_plain(adapted: Adapted, folder: Path) -> None:
    """Write a model without adapters as a transformers folder, its config as the base had it plus the task's fields."""
    config = profiles.config(adapted.base, adapted.task)
    for field in ("pad_token_id", "architectures", "dtype"):
        setattr(config, field, getattr(adapted.model.config, field))
    adapted.model.config = config
    if adapted.task.generates:  # other programs end an answer by what stands here, whatever the template writes
        adapted.model.generation_config.eos_token_id = _templates.answer_ends(adapted.tokenizer, adapted.model)
    with profiles.quiet():
        adapted.model.save_pretrained(folder)


def load_plain(task: Task, folder: Path, device: str, **options: Any) -> PreTrainedModel:
    """Load a transformers folder as any other program would; in fp32, unless the options name a dtype."""
    options = {"dtype": torch.float32, "device_map": {"": device}, "trust_remote_code": False} | options
    with profiles.quiet():
        loaded: PreTrainedModel = profiles.auto_class(task).from_pretrained(folder, **options)
    return loaded.eval()


def save_quantized(adapted: Adapted, plain: Path, form: str, dtype: torch.dtype) -> PreTrainedModel:
    """Write a model that lies in the folder `plain` again, in bitsandbytes' format, to `plain / form`; load that.

    What is not quantized, the heads among it, is held in `dtype`.

    Raises:
        ModelError: It holds other tensors than were written.
    """
    device = str(adapted.device)
    config = quantize.foreign_config(form, (*profiles.outside_names(adapted.model), *adapted.heads))
    made = load_plain(adapted.task, plain, device, dtype=dtype, quantization_config=config)
    with profiles.quiet():
        made.save_pretrained(plain / form)
    found = load_plain(adapted.task, plain / form, device, dtype="auto")
    before, after = made.state_dict(), found.state_dict()
    if before.keys() != after.keys() or not all(torch.equal(tensor, after[name]) for name, tensor in before.items()):
        raise ModelError(f"the model in {form}, loaded again, holds other tensors than were written")
    return found
