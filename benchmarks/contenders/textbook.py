"""The loop of a textbook: all weights are trained in fp32, and every text is padded to the maximum length."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.contenders.trainer import made
from benchmarks.job import Clock, Job, Made

_LEARNING_RATE = 5e-5  # a usual one where all weights are trained
_IGNORED = -100


def run(job: Job, clock: Clock) -> Made:
    """Train by hand."""
    torch.manual_seed(job.seed)
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    if job.chats:
        model = AutoModelForCausalLM.from_pretrained(job.base)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(job.base, num_labels=len(job.prepared["labels"]))
    model.to(job.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    rows = [_padded(job, ids, targets, tokenizer.pad_token_id) for ids, targets in job.sequences("rows")]
    for batch in DataLoader(rows, batch_size=job.work.batch_size, shuffle=True):  # type: ignore[arg-type]
        ids, mask, labels = (tensor.to(job.device) for tensor in batch)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.step(int(mask.sum()))
        if len(clock.times) == job.total_steps:
            break
    return made(model, int(tokenizer.pad_token_id))


def _padded(job: Job, ids: list[int], targets: list[int], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels of a text, each of the maximum length."""
    length = job.prepared["max_length"]
    padding = length - len(ids)
    labels = [_IGNORED, *targets[:-1], *[_IGNORED] * padding] if job.chats else targets[0]
    return torch.tensor(ids + [pad] * padding), torch.tensor([1] * len(ids) + [0] * padding), torch.tensor(labels)
