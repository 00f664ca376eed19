"""Items of rows, of which each row may have another number."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Ragged:
    """The items of the rows of a split, one behind the other."""

    values: "np.ndarray"
    """(items, ...)."""
    starts: "np.ndarray"
    """(R + 1,) where each row begins."""

    @classmethod
    def of(cls, rows: "Sequence[np.ndarray]") -> Self:
        """Put the items of some rows together."""
        import numpy as np

        return cls(np.concatenate(rows), np.cumsum([0, *map(len, rows)]))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> "np.ndarray":
        if row >= len(self):
            raise IndexError(row)
        items: np.ndarray = self.values[self.starts[row] : self.starts[row + 1]]
        return items

    def __iter__(self) -> "Iterator[np.ndarray]":
        return (self[row] for row in range(len(self)))

    def take(self, rows: "np.ndarray") -> "Ragged":
        """The items of some rows."""
        import numpy as np

        counts = np.diff(self.starts)[rows]
        starts = np.concatenate([[0], np.cumsum(counts)])
        index = np.arange(starts[-1]) + np.repeat(self.starts[rows] - starts[:-1], counts)
        return Ragged(self.values[index], starts)

    @cached_property
    def row_of(self) -> "np.ndarray":
        """(items,) the row of each item."""
        import numpy as np

        return np.repeat(np.arange(len(self)), np.diff(self.starts))
