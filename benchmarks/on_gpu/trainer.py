"""transformers' Trainer, PEFT and bitsandbytes as their guides show them, on the same random weights and rows.

Frozen weights that are not quantized have the dtype of the published files; bf16 computes by autocast. Quantized models
go through `prepare_model_for_kbit_training`. No dropout, and checkpointing only where the way says so.
"""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from benchmarks.job import Clock
from benchmarks.on_gpu import setting
from benchmarks.on_gpu.cells import SHAPES
from benchmarks.on_gpu.setting import Ready, Setting
from lowres_ft import libraries, profiles, quantize
from lowres_ft.storage import NF4_BLOCK

_OUTLIERS = 6.0  # above which LLM.int8 multiplies in 16 bits: transformers' default


class InOrder(Trainer):  # type: ignore[misc]
    """Takes the rows in the order in which they are given."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class Ends(TrainerCallback):  # type: ignore[misc]
    """Tells a clock of each step."""

    def __init__(self, clock: Clock, tokens: int) -> None:
        self.clock, self.tokens = clock, tokens

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.step(self.tokens)


def build(found: Setting) -> Ready:
    """Make the model and a Trainer for it."""
    job = found.job
    model = _adapted(found)
    losses: list[Tensor] = []
    model.register_forward_hook(lambda *given: losses.append(given[2].loss.detach()))
    rows = 1 if job.way.row_by_row else job.rows
    options = TrainingArguments(**_arguments(found), per_device_train_batch_size=rows)
    trainer = InOrder(model=model, args=options, train_dataset=_rows(found))

    def run(clock: Clock) -> list[float]:
        trainer.add_callback(Ends(clock, job.rows * job.row))
        trainer.train()
        return [float(loss) for loss in losses] if rows == job.rows else []

    return Ready(run, sum(p.numel() for p in model.parameters() if p.requires_grad))


def _arguments(found: Setting) -> dict[str, Any]:
    job, spec = found.job, found.recipe.train
    return {
        "output_dir": str(found.base.folder / "trainer"),
        "gradient_accumulation_steps": job.rows if job.way.row_by_row else 1,
        "max_steps": found.steps,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": spec.weight_decay,
        "max_grad_norm": spec.clip,
        "bf16": True,
        "use_cpu": job.device == "cpu",
        "seed": spec.seed,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _rows(found: Setting) -> list[dict[str, Any]]:
    rows = setting.tokens(found)
    chosen = []
    for position in setting.in_order(found, rows):
        ids = torch.from_numpy(rows.sequence(position)).long()
        target = torch.from_numpy(rows.target(position)).long()
        # A target stands at the token before it; transformers' labels at its own.
        label: Any = torch.cat([target[-1:], target[:-1]]) if len(target) == len(ids) else int(target)
        chosen.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": label})
    return chosen


def _adapted(found: Setting) -> Any:
    job, method = found.job, found.recipe.method
    model = _model(found)
    checkpointing = job.way.recompute == "layers"
    if job.numbers != "bf16":
        setattr(model, f"is_loaded_in_{'8' if job.numbers == 'int8' else '4'}bit", True)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    elif checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    outside = list(found.profile.outside)
    config = LoraConfig(
        task_type="CAUSAL_LM" if SHAPES[job.shape].generates else "SEQ_CLS",
        r=method.rank,  # type: ignore[attr-defined]  # LoRA's
        lora_alpha=method.alpha,  # type: ignore[attr-defined]
        target_modules=[linear.name for linear in found.profile.linears],
        modules_to_save=None if SHAPES[job.shape].generates else outside,
    )
    return get_peft_model(model, config)


def _model(found: Setting) -> PreTrainedModel:
    """The model as `from_pretrained` with a BitsAndBytesConfig leaves it, made without files."""
    job = found.job
    model = setting.empty_model(found)
    dtype = getattr(torch, SHAPES[job.shape].published)
    layers = profiles.linear_layers(model, found.profile.outside)
    quantized = {} if job.numbers == "bf16" else dict(layers)
    for name, plain in quantized.items():
        model.set_submodule(name, _quantized_layer(plain, job.numbers))

    def held(name: str, value: Tensor) -> nn.Parameter:
        owner, _, leaf = name.rpartition(".")
        if owner in quantized and leaf == "weight":
            return _quantized_weight(value, job.numbers)
        return nn.Parameter(value.to(dtype))

    setting.fill(model, job.device, held)
    return model


def _quantized_layer(plain: nn.Module, numbers: str) -> nn.Module:
    layers = libraries.bitsandbytes().nn
    inputs, outputs = profiles.widths(plain)
    bias = plain.bias is not None
    made: nn.Module
    if numbers == "int8":
        made = layers.Linear8bitLt(inputs, outputs, bias, has_fp16_weights=False, threshold=_OUTLIERS, device="meta")
    else:
        options = {"compute_dtype": torch.bfloat16, "compress_statistics": True, "quant_type": "nf4"}
        made = layers.Linear4bit(inputs, outputs, bias, **options, device="meta")
    return made


def _quantized_weight(value: Tensor, numbers: str) -> nn.Parameter:
    library = libraries.bitsandbytes()
    made: nn.Parameter
    if numbers == "int8":
        ours = quantize.quantized(value, "int8")  # bitsandbytes' codes to the bit, made a few rows at a time
        codes = {"CB": ours.weight, "SCB": ours.absmax}
        made = library.nn.Int8Params(ours.weight, requires_grad=False, has_fp16_weights=False, **codes)
    else:
        packed, state = library.functional.quantize_4bit(
            value, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        made = library.nn.Params4bit(packed, quant_state=state, quant_type="nf4", bnb_quantized=True)
    return made
