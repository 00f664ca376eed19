"""Probe rows: a few texts whose logits lie in a bundle, so that anyone can see that it still computes the same."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowres_ft.batches import Tokens, collate
from lowres_ft.model import Adapted
from lowres_ft.tasks.base import IGNORED, Batch


@dataclass(frozen=True)
class Probe:
    """Token ids of a few rows, (R, T), and their attention mask."""

    ids: Tensor
    mask: Tensor

    def logits(self, adapted: Adapted) -> Tensor:
        """(R, ...) fp32 logits of a model, on the processor."""
        rows = torch.arange(len(self.ids))
        parts = (self.ids, self.mask, torch.full((len(rows), 1), IGNORED), rows)
        batch = Batch(*(part.to(adapted.device) for part in parts))
        was_training = adapted.model.training
        adapted.model.eval()
        with torch.inference_mode(), adapted.computing():
            found = adapted.task.logits(adapted.model, batch).float().cpu().clone()
        adapted.model.train(was_training)
        return found


def make_probe(tokens: Tokens, rows: int, adapted: Adapted) -> Probe | None:
    """The first sequences of a split as a probe; None for no rows."""
    count = min(rows, len(tokens.lengths))
    if not count:
        return None
    batch = collate(tokens, np.arange(count), adapted)
    return Probe(batch.ids.cpu(), batch.mask.cpu())
