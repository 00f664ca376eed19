"""Tags of words in the schemes that files use, and the entities that they mean.

IOB1, BIO (IOB2), BIOES and BILOU are read by one rule, which needs no knowledge of the scheme: B-, S- and U- begin an
entity; I-, E- and L- go on with an entity of their type, and begin one where the word before has none that is still
open. That is how seqeval reads tags (`get_entities`, its default mode).
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

OUTSIDE = "O"
_BEGINNING, _ENDING, _PREFIXES = "BSU", "ESLU", "BIESLU"


def is_tag(tag: object) -> bool:
    """Whether a value is `O` or, as in `B-PER`, a prefix and a type."""
    if not isinstance(tag, str):
        return False
    return tag == OUTSIDE or (tag[:1] in _PREFIXES and tag[1:2] == "-" and bool(tag[2:].strip()))


def to_bio(tags: Sequence[str]) -> list[str]:
    """The same entities in BIO, where B- begins each and I- goes on with it."""
    found = []
    still_open = ""  # the type of the entity that the word before is in
    for tag in tags:
        prefix, kind = tag[0], tag[2:]
        if tag == OUTSIDE:
            found.append(tag)
        else:
            found.append(f"{'B' if prefix in _BEGINNING or kind != still_open else 'I'}-{kind}")
        still_open = "" if prefix in _ENDING else kind
    return found


def of_types(types: Sequence[str]) -> tuple[str, ...]:
    """The tags of some types in BIO, in the order in which `entities` counts them."""
    return (OUTSIDE, *(f"{prefix}-{kind}" for kind in types for prefix in "BI"))


def types_in(tags: Sequence[str]) -> tuple[str, ...]:
    """The types of the entities of some tags, sorted."""
    return tuple(sorted({tag[2:] for tag in tags if tag != OUTSIDE}))


def begun_inside(tags: Sequence[str]) -> Iterator[int]:
    """Places of the tags that begin an entity though, in every scheme but IOB1, they go on with one."""
    return (
        place
        for place, (tag, bio) in enumerate(zip(tags, to_bio(tags), strict=True))
        if bio[0] == "B" and tag[0] not in _BEGINNING
    )


def may_be_iob1(tags: Sequence[str]) -> bool:
    """Whether B- stands only where an entity follows another of its type, and no other prefix but I- at all."""
    before = ("", *tags)
    return all(
        tag == OUTSIDE or tag[0] == "I" or (tag[0] == "B" and previous[2:] == tag[2:])
        for previous, tag in zip(before, tags, strict=False)
    )


def entities(classes: "np.ndarray", rows: "np.ndarray") -> "np.ndarray":
    """The entities of words, (E, 3): the first word, the one after the last, and the type.

    Args:
        classes: (words,) places in `of_types`: 0 is O, 2k + 1 begins an entity of type k, 2k + 2 goes on with one.
        rows: (words,) the row of each word; no entity goes on from one row to the next.
    """
    import numpy as np

    kind = (classes - 1) // 2
    goes_on = (classes > 0) & (classes % 2 == 0)
    goes_on[:1] = False
    goes_on[1:] &= (kind[1:] == kind[:-1]) & (rows[1:] == rows[:-1])
    starts = np.flatnonzero(~goes_on)
    found = np.stack([starts, np.append(starts, len(classes))[1:], kind[starts]], axis=1)
    return np.asarray(found[found[:, 2] >= 0])


def errors(truth: "np.ndarray", found: "np.ndarray", rows: "np.ndarray") -> dict[str, int]:
    """How entities that are not right are wrong, counted.

    `borders`: found with its type, but not from its first word to its last; `type`: in its place with another type;
    `both`; `invented`: found where none is; `missed`: none was found where it is.

    Args:
        truth: (words,) classes, as in `entities`.
        found: (words,) the classes that were answered.
        rows: (words,) the row of each word.
    """
    import numpy as np

    gold, answers = entities(truth, rows), entities(found, rows)
    owners = []
    for spans in (gold, answers):
        owner = np.full(len(truth), -1)
        for number, (first, last, _) in enumerate(spans.tolist()):
            owner[first:last] = number
        owners.append(owner)
    counts = dict.fromkeys(("borders", "type", "both", "invented", "missed"), 0)
    known = {(first, last): kind for first, last, kind in gold.tolist()}
    for first, last, kind in answers.tolist():
        if (there := known.get((first, last))) is not None:
            counts["type"] += there != kind
            continue
        touched = {int(gold[number, 2]) for number in owners[0][first:last] if number >= 0}
        counts["borders" if kind in touched else "both" if touched else "invented"] += 1
    counts["missed"] = sum(int((owners[1][first:last] < 0).all()) for first, last, _ in gold.tolist())
    return counts
