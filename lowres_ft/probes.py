"""Probe rows: a few texts whose logits lie in a bundle, so that anyone can see that it still computes the same."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from lowres_ft.batches import Tokens, collate
from lowres_ft.errors import BundleError
from lowres_ft.model import Adapted
from lowres_ft.tasks.base import IGNORED, Batch

_TOKENS = 512  # that pass through the model at once


@dataclass(frozen=True)
class Probe:
    """Token ids of a few rows, (R, T), their attention mask and, of pairs, which text each token is of."""

    ids: Tensor
    mask: Tensor
    segments: Tensor | None = None

    @classmethod
    def of(cls, held: Mapping[str, Tensor], path: Path) -> Self:
        """The probe that a bundle's file holds.

        Raises:
            BundleError: It holds something else.
        """
        ids, mask, logits = (held.get(name) for name in ("input_ids", "attention_mask", "logits"))
        segments = held.get("token_type_ids")
        if ids is None or mask is None or logits is None or logits.dim() < 2 or len(ids) != len(logits):
            raise BundleError(f"{path} does not hold token ids, their mask and logits of equally many rows")
        same = [part for part in (ids, mask, segments) if part is not None]
        if ids.dim() != 2 or any(part.shape != ids.shape or part.dtype != torch.int64 for part in same):
            raise BundleError(f"{path}: token ids and their mask are not whole numbers of one shape")
        return cls(ids, mask, segments)

    def tensors(self) -> dict[str, Tensor]:
        """The probe as it lies in a bundle's file."""
        segments = {} if self.segments is None else {"token_type_ids": self.segments}
        return {"input_ids": self.ids, "attention_mask": self.mask, **segments}

    def logits(self, adapted: Adapted) -> Tensor:
        """(R, ...) fp32 logits of a model, on the processor.

        Raises:
            BundleError: The token ids are not those of its vocabulary.
        """
        size = adapted.model.get_input_embeddings().weight.shape[0]
        if len(self.ids) and not 0 <= int(self.ids.min()) <= int(self.ids.max()) < size:
            raise BundleError(f"the probe rows hold token ids beyond the model's {size}")
        was_training = adapted.model.training
        adapted.model.eval()
        try:
            with torch.inference_mode(), adapted.computing():
                found = [adapted.task.logits(adapted.model, one).float().cpu() for one in self._batches(adapted.device)]
                return torch.cat(found)
        finally:
            adapted.model.train(was_training)

    def _batches(self, device: torch.device) -> Iterator[Batch]:
        """Yield the rows, few at once: a run that has ended takes no more for them than its steps did."""
        count, width = self.ids.shape
        every = (self.ids, self.mask, torch.full((count, 1), IGNORED), torch.arange(count))
        step = max(1, _TOKENS // max(1, width))
        for some in (slice(start, start + step) for start in range(0, max(1, count), step)):
            batch = Batch(*(part[some].to(device) for part in every))
            yield batch if self.segments is None else replace(batch, segments=self.segments[some].to(device))


def make_probe(tokens: Tokens, rows: int, adapted: Adapted) -> Probe | None:
    """The first sequences of a split as a probe; None for no rows."""
    count = min(rows, len(tokens.lengths))
    if not count:
        return None
    batch = collate(tokens, np.arange(count), adapted)
    return Probe(batch.ids.cpu(), batch.mask.cpu(), None if batch.segments is None else batch.segments.cpu())
