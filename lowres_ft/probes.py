"""Probe rows: a few texts whose logits lie in a bundle, so that anyone can see that it still computes the same."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from lowres_ft.batches import Tokens, collate
from lowres_ft.errors import BundleError
from lowres_ft.model import Adapted
from lowres_ft.tasks.base import IGNORED, Batch


@dataclass(frozen=True)
class Probe:
    """Token ids of a few rows, (R, T), their attention mask and, of pairs, which text each token is of."""

    ids: Tensor
    mask: Tensor
    segments: Tensor | None = None

    @classmethod
    def of(cls, held: Mapping[str, Tensor]) -> Self:
        """The probe that a bundle's file holds.

        Raises:
            BundleError: It holds something else.
        """
        ids, mask, logits = (held.get(name) for name in ("input_ids", "attention_mask", "logits"))
        if ids is None or mask is None or logits is None or ids.shape != mask.shape or len(ids) != len(logits):
            raise BundleError("the probe rows do not hold token ids, their mask and logits of equally many rows")
        return cls(held["input_ids"], held["attention_mask"], held.get("token_type_ids"))

    def tensors(self) -> dict[str, Tensor]:
        """The probe as it lies in a bundle's file."""
        segments = {} if self.segments is None else {"token_type_ids": self.segments}
        return {"input_ids": self.ids, "attention_mask": self.mask, **segments}

    def logits(self, adapted: Adapted) -> Tensor:
        """(R, ...) fp32 logits of a model, on the processor."""
        rows = torch.arange(len(self.ids))
        parts = (self.ids, self.mask, torch.full((len(rows), 1), IGNORED), rows)
        batch = Batch(*(part.to(adapted.device) for part in parts))
        if self.segments is not None:
            batch = replace(batch, segments=self.segments.to(adapted.device))
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
    return Probe(batch.ids.cpu(), batch.mask.cpu(), None if batch.segments is None else batch.segments.cpu())
