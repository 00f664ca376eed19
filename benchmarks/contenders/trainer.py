"""transformers' Trainer with PEFT, as their guides show it."""

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from benchmarks.job import Clock, Job, Made

_LORA_DROPOUT = 0.1  # of PEFT's example for sequence classification
_NO_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")


class Steps(TrainerCallback):  # type: ignore[misc]
    """Tells the clock of each step, and of the real tokens that the collator put into it."""

    def __init__(self, clock: Clock, collate: Any) -> None:
        self.clock = clock
        self.collate = collate
        self.tokens: list[int] = []

    def __call__(self, rows: Any) -> Any:
        """Collate rows; Trainer may fetch a batch ahead, so that tokens wait here for their step."""
        batch = self.collate(rows)
        mask = batch.get("attention_mask")
        self.tokens.append(int(batch["input_ids"].numel() if mask is None else mask.sum()))
        return batch

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.step(self.tokens[len(self.clock.times)])


def run(job: Job, clock: Clock) -> Made:
    """Train, or predict with the adapter that was prepared."""
    set_seed(job.seed)
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    model = _model(job)
    rows = Dataset.from_list([{"input_ids": ids, "labels": target} for ids, (target,) in job.sequences("rows")])
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments(job)),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    if job.work.predicts:
        for part in (rows.select(range(job.work.warmup * job.work.batch_size)), rows):
            trainer.predict(part)
            clock.step(sum(map(len, part["input_ids"])))
    else:
        train(trainer, clock)
    return made(trainer.model, int(tokenizer.pad_token_id))


def arguments(job: Job) -> dict[str, Any]:
    """Options of the training; what is not here is left at its default."""
    bf16 = job.contender.numbers != "fp32"
    return {
        "output_dir": str(job.folder / "trainer"),
        "per_device_train_batch_size": job.work.batch_size,
        "per_device_eval_batch_size": job.work.batch_size,
        "max_steps": job.total_steps,
        "learning_rate": job.learning_rate,
        "weight_decay": job.prepared["weight_decay"],
        "max_grad_norm": job.prepared["clip"],
        "bf16": bf16,
        "bf16_full_eval": bf16 and job.work.predicts and job.contender.even,
        "use_cpu": job.device == "cpu",
        "seed": job.seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def train(trainer: Any, clock: Clock) -> None:
    """Train to the end, counting steps and tokens."""
    steps = Steps(clock, trainer.data_collator)
    trainer.data_collator = steps
    trainer.add_callback(steps)
    trainer.train()


def lora(job: Job, dropout: float) -> Any:
    """The work's adapter."""
    return LoraConfig(
        task_type="CAUSAL_LM" if job.chats else "SEQ_CLS",
        r=job.prepared["rank"],
        lora_alpha=job.prepared["alpha"],
        lora_dropout=0.0 if job.contender.even else dropout,
        target_modules="all-linear",
    )


def _model(job: Job) -> Any:
    even, int8 = job.contender.even, job.contender.numbers == "int8"
    options: dict[str, Any] = {"num_labels": len(job.prepared["labels"])}
    if even:
        options |= dict.fromkeys(_NO_DROPOUT, 0.0)
    if int8:
        # PEFT cannot train a copy of a head that is quantized: 'Parameter' object has no attribute 'CB'.
        quantized = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier"])
        options |= {"quantization_config": quantized, "device_map": {"": job.device}}
    model = AutoModelForSequenceClassification.from_pretrained(job.base, **options)
    if job.work.predicts:
        return PeftModel.from_pretrained(model, str(job.folder / "adapter"))
    if int8:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=not even)
    return get_peft_model(model, lora(job, _LORA_DROPOUT))


def made(model: Any, pad: int) -> Made:
    """What is compared of a model of transformers or PEFT."""
    model.eval()
    tensors = (*model.parameters(), *model.buffers())

    def logits(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
        return found

    return Made(
        logits=logits,
        pad=pad,
        trainable_parameters=sum(tensor.numel() for tensor in tensors if tensor.requires_grad),
        frozen_bytes=sum(tensor.nbytes for tensor in tensors if not tensor.requires_grad),
    )
