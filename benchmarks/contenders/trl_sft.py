"""TRL's SFTTrainer with PEFT."""

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from benchmarks.contenders.trainer import arguments, lora, made, train
from benchmarks.job import Clock, Job, Made

_LORA_DROPOUT = 0.05  # of TRL's and PEFT's examples for language models
_IGNORED = -100


def run(job: Job, clock: Clock) -> Made:
    """Train on rows that are tokens with labels already, so that all learn from the same answers."""
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    rows = Dataset.from_list(
        [{"input_ids": ids, "labels": [_IGNORED, *targets[:-1]]} for ids, targets in job.sequences("rows")]
    )
    options = arguments(job) | {"max_length": job.prepared["max_length"], "packing": job.contender.packed}
    if job.contender.packed:
        options["per_device_train_batch_size"] = _packed_rows(job)
    if job.contender.even:
        options["gradient_checkpointing"] = False
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.base),
        args=SFTConfig(**options),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora(job, _LORA_DROPOUT),
    )
    train(trainer, clock)
    return made(trainer.model, int(tokenizer.pad_token_id))


def _packed_rows(job: Job) -> int:
    """Packed rows in a batch that hold about as many texts as a batch of texts does."""
    tokens = float(job.prepared["mean_tokens"]) * job.work.batch_size
    return max(1, round(tokens / int(job.prepared["max_length"])))
