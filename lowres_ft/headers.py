"""What the headers of a base's weight files tell in a moment, without a heavy library: words, and a stack of layers.

Names differ between architectures, and files hold more than a task's model does: other stacks, heads, masks. So nothing
is taken for a part of the model here that one of the bases that lowres-ft knows would leave out.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from lowres_ft import assets, bases, foreign
from lowres_ft.errors import LowresError

Shapes = dict[str, tuple[int, ...]]
"""Of tensors, by their names."""
_LAYER = re.compile(r"\.\d+\.")
_WORDS = re.compile(r"embed(?!_out)|\bw[tp]e\b")
_OTHER = re.compile(r"vision|visual|audio|image|\bmtp\b")  # parts that a model of texts may leave out
_UNSURE = re.compile(r"embed|expert|router|gate\.weight|norm|bias|posi|conv")  # of a layer: may be held in other forms


@dataclass(frozen=True)
class Outline:
    """The shapes of a base's weights; none of a base that does not lie here."""

    words: Shapes = field(default_factory=dict)
    """Embeddings, of places too; the output layer is not among them."""
    layers: tuple[Shapes, ...] = ()
    """Of the largest stack."""

    @classmethod
    def of(cls, source: str) -> "Outline":
        """That of a base by its source in a recipe, if it need not be fetched and is sound."""
        folder = _folder(source)
        try:
            names = [] if folder is None else bases.weight_files(folder)
            return cls.made({name: shape for file in names for name, shape in _header(Path(folder or "", file))})
        except (LowresError, OSError, ValueError, KeyError, TypeError, AttributeError):  # for those to tell who read it
            return cls()

    @classmethod
    def made(cls, shapes: Shapes) -> "Outline":
        """Of all tensors in a base's files."""
        words: Shapes = {}
        stacks: dict[str, dict[str, Shapes]] = defaultdict(lambda: defaultdict(dict))
        beside = any("encoder." in name for name in shapes)  # some tasks take the encoder alone
        for name, shape in shapes.items():
            mask = name.endswith("bias") and len(shape) > 1
            if mask or _OTHER.search(name) or (beside and "decoder." in name):
                continue
            if layer := _LAYER.search(name):
                stacks[name[: layer.start()]][layer.group()][name] = shape
            elif _WORDS.search(name):
                words[name] = shape
        largest = max(stacks.values(), key=lambda stack: sum(map(elements, stack.values())), default={})
        return cls(words, tuple(largest.values()))

    @property
    def linears(self) -> Shapes:
        """The weights of layers that are sure to be those of linear layers, by the names of these."""
        return {name: shape for layer in self.layers for name, shape in linears(layer).items()}


def linears(layer: Shapes) -> Shapes:
    """The linear layers of one layer of a stack, as far as names and shapes tell; packed codes have other shapes."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in layer.items()
        if name.endswith(".weight") and len(shape) == 2 and min(shape) > 1 and not _UNSURE.search(name)
    }


def elements(shapes: Shapes) -> int:
    """Numbers in all tensors."""
    return sum(map(prod, shapes.values()))


def _folder(base: str) -> Path | None:
    """Where a base lies, if it need not be fetched."""
    if base.startswith("starter:"):
        try:
            folder = assets.starter(base.removeprefix("starter:")).asset.folder
        except LowresError:
            return None
    else:
        folder = Path(os.path.expanduser(base))
    return folder if os.path.isdir(folder) else None


def _header(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of a safetensors file.

    Raises:
        ValueError: It is none.
    """
    with path.open("rb") as file:
        for name, entry in foreign.read_header(file).items():
            yield name, tuple(map(int, entry["shape"]))
