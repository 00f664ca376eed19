"""Frozen layers that pass through room for two: a base trains that is larger than the device's memory.

On a processor the layers of a stack lie in a mapped file: the one that computes is in memory, the next one, forward or
backward, is read ahead, and the one before is given back. On a GPU they lie in the machine's memory and are copied into
two slots by a stream of their own: layer k always into slot k mod 2, so that its weights have one address for good and
autograd needs to know nothing. Both ways a weight has the bytes that it would have if it stayed, so all results have.

The embedding of words, where no output layer shares it, stays in the machine's memory too: a GPU gets the rows that it
asks for.

A layer says that it begins: forward before it is called, backward when the gradient of its output comes. All that the
layer beyond it does is asked of the device by then, as autograd takes later operations first.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from lowres_ft import mapped
from lowres_ft.mapped import Block, Need
from lowres_ft.storage import Storage

_SLOTS = 2


class Place(Protocol):
    """Where layers are held while they compute."""

    def show(self, at: int, ahead: int | None) -> None:
        """Have layer `at` there, and begin to bring the one `ahead`."""

    def resident(self) -> set[int]:
        """Layers that are there or on their way."""

    def settle(self) -> None:
        """Leave all layers where they can be used at any time."""


class Stream:
    """The layers of a stack, each of which is there when it computes."""

    def __init__(self, layers: Sequence[nn.Module], place: Place, undo: Callable[[], None] = lambda: None) -> None:
        """Listen to each layer; `undo` is done at the end."""
        self.place, self.count, self._undo = place, len(layers), undo
        self.most = 0
        """Most layers that were resident at once."""
        self.entered = 0
        """How often a layer began, forward or backward."""
        self._hooks: list[Any] = []
        for at, layer in enumerate(layers):
            self._hooks.append(layer.register_forward_pre_hook(partial(self._before, at)))
            self._hooks.append(layer.register_forward_hook(partial(self._after, at)))

    def _before(self, at: int, *_: Any) -> None:
        self.enter(at, 1)

    def _after(self, at: int, _: nn.Module, inputs: Any, output: Any) -> None:
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda _: self.enter(at, -1))  # type: ignore[no-untyped-call]

    def enter(self, at: int, step: int) -> None:
        """Have a layer there whose pass begins; the next one in the direction of `step` follows."""
        ahead = at + step
        self.place.show(at, ahead if 0 <= ahead < self.count else None)
        self.entered += 1
        self.most = max(self.most, len(self.place.resident()))

    def end(self) -> None:
        """Let all layers be used at any time from now on, such as to merge; that takes the memory of all of them."""
        for hook in self._hooks:
            hook.remove()
        self.place.settle()
        self._undo()


class Pages:
    """Layers in a mapped file. Their tensors can always be used; what is told here is what stays in memory."""

    def __init__(self, layers: Sequence[Block], others: Sequence[Block] = ()) -> None:
        """Take blocks of layers; pages of the `others` go whenever a layer begins."""
        self.layers, self.others = layers, others
        self.shown: set[int] = set()
        mapped.drop((*layers, *others))

    def show(self, at: int, ahead: int | None) -> None:
        wanted = {at} if ahead is None else {at, ahead}
        for other in self.shown - wanted:
            self.layers[other].drop()
        mapped.drop(self.others)
        for coming in wanted - self.shown:
            self.layers[coming].ahead()
        self.shown = wanted

    def resident(self) -> set[int]:
        return self.shown

    def settle(self) -> None:
        """Nothing is to be done: pages come as they are touched."""


class Copies(Protocol):
    """What copies into slots while others compute."""

    def start(self, slot: Tensor, source: Tensor) -> Callable[[], None]:
        """Begin when all that was asked for so far is done; the function returned makes later work wait for it."""


class CudaCopies:
    """Copies by a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        """Make the stream."""
        self.device, self.stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, slot: Tensor, source: Tensor) -> Callable[[], None]:
        free = torch.cuda.current_stream(self.device).record_event()
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(free)
            slot.copy_(source, non_blocking=True)
            done = self.stream.record_event()
        return lambda: torch.cuda.current_stream(self.device).wait_event(done)


class Part(NamedTuple):
    """A tensor of a layer, and where in the layer's bytes it begins."""

    tensor: Tensor
    begin: int


class Slots:
    """Two slots on a device, through which the bytes of layers pass."""

    def __init__(
        self, sources: Sequence[Tensor], parts: Sequence[Sequence[Part]], copies: Copies, device: torch.device
    ) -> None:
        """Let the tensors of each layer lie in its slot; `sources` are all bytes of each layer."""
        self.sources, self.parts, self.copies = sources, parts, copies
        size = max(source.numel() for source in sources)
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(_SLOTS)]
        self.copied = 0
        """Bytes so far."""
        self.held: list[int | None] = [None] * _SLOTS
        self.waits: list[Callable[[], None] | None] = [None] * _SLOTS
        for at, layer in enumerate(parts):
            for tensor, begin in layer:
                tensor.data = _at(self.slots[at % _SLOTS], begin, tensor)

    def show(self, at: int, ahead: int | None) -> None:
        self._bring(at)
        wait, self.waits[at % _SLOTS] = self.waits[at % _SLOTS], None
        if wait is not None:
            wait()
        if ahead is not None:
            self._bring(ahead)

    def _bring(self, at: int) -> None:
        slot, source = at % _SLOTS, self.sources[at]
        if self.held[slot] == at:
            return
        if (pending := self.waits[slot]) is not None:  # of a layer that was not asked for in the end
            pending()
        self.held[slot] = None  # while an interrupt could leave it half there
        self.waits[slot] = self.copies.start(self.slots[slot][: source.numel()], source)
        self.held[slot] = at
        self.copied += source.numel()

    def resident(self) -> set[int]:
        return {at for at in self.held if at is not None}

    def settle(self) -> None:
        """Give each tensor memory of its own on the device."""
        device = self.slots[0].device
        for source, layer in zip(self.sources, self.parts, strict=True):
            for tensor, begin in layer:
                tensor.data = _at(source, begin, tensor).to(device, copy=True)
        self.slots.clear()


def _at(whole: Tensor, begin: int, like: Tensor) -> Tensor:
    """The tensor that lies in bytes (N,) from `begin`, with the dtype, shape and strides of another."""
    part = whole[begin : begin + like.numel() * like.element_size()].view(like.dtype)
    return part.as_strided(like.shape, like.stride(), part.storage_offset())


class HostEmbedding(nn.Module):
    """An embedding that stays in the machine's memory and sends rows to a device."""

    def __init__(self, inner: nn.Module, device: torch.device) -> None:
        """Stand in for `inner`, whose weight is none of the model's as PyTorch sees it: it has another device."""
        super().__init__()
        self.device = device
        self._inner = (inner,)

    @property
    def inner(self) -> nn.Module:
        """What it stands in for."""
        return self._inner[0]

    @property
    def weight(self) -> Tensor:
        """As it is held."""
        held: Tensor = self.inner.weight  # type: ignore[assignment]
        return held

    def forward(self, index: Tensor) -> Tensor:
        """(...) -> (..., features)."""
        rows: Tensor = self.inner(index.cpu())
        return rows.to(self.device)


def words_apart(model: PreTrainedModel) -> str | None:
    """Name of a frozen embedding of words that no output layer shares; None where there is none."""
    words, written = model.get_input_embeddings(), model.get_output_embeddings()
    held = list(words.parameters()) + list(words.buffers())
    shared = [] if written is None else [*written.parameters(), *written.buffers()]
    if any(tensor.requires_grad for tensor in held) or {id(one) for one in held} & {id(one) for one in shared}:
        return None
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[words]


def weights(layer: nn.Module) -> list[Tensor]:
    """What of a layer passes: its frozen matrices and codes. Norms and biases, which are small, stay."""
    found: dict[int, Tensor] = {}
    for module in layer.modules():
        held = module.buffers if isinstance(module, Storage) else module.parameters
        for tensor in held(recurse=False):
            if isinstance(module, Storage) or (not tensor.requires_grad and tensor.dim() > 1):
                found[id(tensor)] = tensor
    return list(found.values())


def layer_bytes(model: PreTrainedModel, stack: str) -> list[int]:
    """Bytes of each layer that pass."""
    layers = model.get_submodule(stack).children()
    return [sum(tensor.numel() * tensor.element_size() for tensor in weights(layer)) for layer in layers]


def begin(model: PreTrainedModel, stack: str | None, device: str, known: Sequence[Block] = ()) -> Stream:
    """Let the layers of a model pass; all else of it goes to the device.

    `known` are blocks that hold weights already: of the layers in their order, and then of others.

    Raises:
        OutputError: The disk does not hold the layers.
    """
    assert stack is not None
    layers = list(model.get_submodule(stack).children())
    held = list(_blocks(layers, known))
    if device == "cpu":
        return Stream(layers, Pages(held, known[len(layers) :]))
    return through_slots(model, layers, held, CudaCopies(torch.device(device)), torch.device(device))


def _blocks(layers: Sequence[nn.Module], known: Sequence[Block]) -> Iterator[Block]:
    """The block of each layer; weights that lie elsewhere are moved into one."""
    for at, layer in enumerate(layers):
        tensors = weights(layer)
        if at < len(known) and all(known[at].place(tensor) is not None for tensor in tensors):
            yield known[at]
            continue
        (block,) = mapped.blocks([[Need(tensor.shape, tensor.dtype) for tensor in tensors]])
        for tensor in tensors:
            tensor.data = block.tensor(Need(tensor.shape, tensor.dtype)).copy_(tensor)
        block.drop()
        yield block


def through_slots(
    model: PreTrainedModel, layers: Sequence[nn.Module], held: Sequence[Block], copies: Copies, device: torch.device
) -> Stream:
    """Let layers that lie in blocks pass through slots on a device, to which all else of the model goes."""
    parts = [
        [Part(tensor, begin) for tensor in weights(layer) if (begin := block.place(tensor)) is not None]
        for layer, block in zip(layers, held, strict=True)
    ]
    undo = _keep_words(model, device)
    passing = {id(part.tensor) for layer in parts for part in layer}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in passing:
            tensor.data = tensor.data.to(device)
    return Stream(layers, Slots(_sources(held, device), parts, copies, device), undo)


def _keep_words(model: PreTrainedModel, device: torch.device) -> Callable[[], None]:
    """Let the embedding of words stay where it is; return what undoes that."""
    name = words_apart(model)
    if name is None:
        return lambda: None
    words, known = model.get_submodule(name), weakref.ref(model)  # a model that held itself would not go when it could
    model.set_submodule(name, HostEmbedding(words, device))

    def undo() -> None:
        if (still := known()) is not None:
            still.set_submodule(name, words.to(device))

    return undo


def _sources(held: Sequence[Block], device: torch.device) -> list[Tensor]:
    """The bytes of each layer in memory that a GPU reads by itself, or mapped where there is too little of it."""
    import psutil

    size = sum(block.size for block in held)
    if device.type != "cuda" or size > _OF_FREE * psutil.virtual_memory().available:
        return [block.bytes for block in held]
    sources = []
    for block in held:
        sources.append(torch.empty(block.size, dtype=torch.uint8, pin_memory=True).copy_(block.bytes))
        block.drop()
    return sources


_OF_FREE = 0.8  # of the machine's free memory, which layers may take at the most
