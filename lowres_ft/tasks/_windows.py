"""Word pieces, and long texts in overlapping windows of them."""

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowres_ft.errors import ModelError
from lowres_ft.tasks.base import IGNORED, Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Pieces:
    """The word pieces of a text."""

    ids: list[int]
    firsts: list[int]
    """The piece of each word by which it is tagged: its first one; they ascend, and no two are the same."""


@dataclass(frozen=True)
class StandIns:
    """Ids of pieces that show no part of a word."""

    missing: int
    """What stands for a word without pieces: the unknown token, else the one that pads."""
    space: int | None
    """Metaspace alone, which SentencePiece puts before a text with the place of the first character."""

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "StandIns":
        """Those of a tokenizer."""
        unknown, space = tokenizer.unk_token_id, tokenizer.convert_tokens_to_ids("\u2581")
        return cls(tokenizer.pad_token_id if unknown is None else unknown, None if space == unknown else space)


def align(
    ids: Sequence[int], offsets: Sequence[Sequence[int]], words: Sequence[Sequence[int]], stand_ins: StandIns
) -> Pieces:
    """The pieces of a text, in which every word has one of its own.

    A piece in which several words begin is repeated for each. A word that no piece shows, such as one of control
    characters, gets the piece `missing` of the stand-ins.

    Args:
        ids: (T,) the pieces as the tokenizer makes them.
        offsets: (T,) [start, end) of each in the text; a piece may begin with the space before its word.
        words: (W,) [start, end) of each word in the text.
        stand_ins: Pieces that show no part of a word.
    """
    ends = [start if one == stand_ins.space else end for one, (start, end) in zip(ids, offsets, strict=True)]
    found: list[int] = []
    firsts: list[int] = []
    piece, repeated = 0, -1
    for start, end in words:
        while piece < len(ids) and ends[piece] <= start:
            found += [ids[piece]] * (piece != repeated)
            piece += 1
        shown = piece < len(ids) and offsets[piece][0] < end
        firsts.append(len(found))
        found.append(ids[piece] if shown else stand_ins.missing)
        repeated = piece if shown else repeated
    found += ids[piece + (piece == repeated) :]
    return Pieces(found, firsts)


def windows(length: int, room: int, overlap: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut `length` pieces into as few windows of at most `room` as can be, all about as long, which share `overlap`.

    Yields:
        A window [start, end) and the part [first, last) of it that it alone answers for: where its pieces have more
        context to both sides than in its neighbours. The parts make up the whole.
    """
    overlap = min(overlap, room // 2)
    count = max(1, -(-(length - overlap) // (room - overlap)))
    size = -(-(length + (count - 1) * overlap) // count)
    starts = [at * (length - size) // max(1, count - 1) for at in range(count)]
    cuts = [0, *((one + size - 1 + other) // 2 + 1 for one, other in itertools.pairwise(starts)), length]
    for start, (first, last) in zip(starts, itertools.pairwise(cuts), strict=True):
        yield start, start + size, first, last


@dataclass(frozen=True)
class Cutter:
    """Makes the token sequences of a text from its pieces and the class of each word."""

    before: list[int]
    """Special tokens that the tokenizer puts before a text."""
    after: list[int]
    room: int
    """Pieces of a window."""
    overlap: int

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", max_length: int, overlap: int) -> "Cutter":
        """Find the special tokens in what the tokenizer makes of a short text.

        Raises:
            ModelError: It cannot say where in the text a piece stands, or a window has no room beside special tokens.
        """
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} does not tell where in a text its pieces stand",
                hint="Use a base with a fast tokenizer (tokenizer.json).",
            )
        encoded = tokenizer("a")
        inside = [place for place, sequence in enumerate(encoded.sequence_ids(0)) if sequence is not None]
        ids: list[int] = encoded["input_ids"]
        first, last = (inside[0], inside[-1] + 1) if inside else (len(ids), len(ids))
        room = max_length - first - len(ids[last:])
        if room < 1:
            raise ModelError(f"task.max_length is {max_length}, which {len(ids)} special tokens fill", hint="Raise it.")
        return cls(ids[:first], ids[last:], room, overlap)

    def cut(self, pieces: Pieces, classes: Sequence[int]) -> list[Encoded]:
        """Windows whose items are, one behind the other, the words; a window in which none begins is left out."""
        found = []
        for start, end, first, last in windows(len(pieces.ids), self.room, self.overlap):
            words = range(bisect_left(pieces.firsts, first), bisect_left(pieces.firsts, last))
            if not words:
                continue
            ids = [*self.before, *pieces.ids[start:end], *self.after]
            targets = [IGNORED] * len(ids)
            for word in words:
                targets[len(self.before) + pieces.firsts[word] - start] = classes[word]
            found.append(Encoded(ids, targets))
        return found
