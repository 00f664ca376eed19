"""The cross-entropy of a language model, whose logits (tokens x vocabulary) never stand in memory whole.

Of a forward pass only the hidden states before the output layer are taken, at the tokens that count. A chunk of them
at a time gives logits, losses and at once the gradient of the summed loss,

    d logits = softmax(logits) - onehot(target),

from which those of the hidden states and of what is trained in the output layer follow. So nothing of the size of the
vocabulary is kept for the backward pass or computed twice (as in Liger, Hsu et al. 2024, arXiv:2410.10989).

Some models do more to their logits than their output layer does: Gemma 2 caps them, Granite and Cohere scale them.
What it is, is told by the first token, for which the whole model is asked each time. Where it is nothing known here,
the logits are the model's own, at all tokens that count at once.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import mul, pos
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from lowres_ft.tasks.base import Batch

    After = Callable[[Tensor], Tensor]

LOGITS = {"cpu": 2**23, "mps": 2**23, "cuda": 2**26}
"""Logits that stand in memory at once, a few times over."""
_PART, _FEW = 4, 64
"""Which part of a batch's tokens may have their logits at once, and tokens that may in any case: where little memory
makes batches small, logits are few, too."""
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
"""Fields of configs that say c, where a model does c tanh(x / c), x * c or x / c to its logits."""
_FP16_SCALE = 16.0  # keeps small probabilities above fp16's smallest number, and their sums below its largest
_UNKNOWN: "WeakSet[Any]" = WeakSet()  # models that do to their logits what is not known here


def loss(model: "PreTrainedModel", batch: "Batch", wanted: "Tensor") -> "Tensor":
    """The summed cross-entropy at the N wanted tokens of a mask (B, T), in fp32."""
    from torch.nn.functional import cross_entropy

    hidden = _hidden(model, batch, wanted)
    if hidden is None:
        return cross_entropy(logits(model, batch, wanted), batch.targets[wanted], reduction="sum")
    return _summed(hidden)


def outputs(model: "PreTrainedModel", batch: "Batch", wanted: "Tensor") -> "Tensor":
    """(N, 2) fp32: the loss at each wanted token, and 1 where its target is the likeliest."""
    import torch

    hidden = _hidden(model, batch, wanted)
    if hidden is None:
        return _scored(logits(model, batch, wanted), batch.targets[wanted])
    return torch.cat([_scored(hidden.logits(states), targets) for states, targets in hidden.chunks()])


def logits(model: "PreTrainedModel", batch: "Batch", wanted: "Tensor") -> "Tensor":
    """(N, V) fp32 logits at the wanted tokens, all at once."""
    with _tapped(model, wanted, most=None) as tap:
        found = _forward(model, batch)
    return (found[0] if tap.states else found[wanted]).float()


def bounded(model: "PreTrainedModel", batch: "Batch") -> bool:
    """Whether the logits of a model never stand in memory whole; a batch with an item tells."""
    return _hidden(model, batch, batch.mask.bool()) is not None


@dataclass(frozen=True)
class _Hidden:
    """What goes into the output layer at the tokens that count, and what becomes of it."""

    states: "Tensor"
    """(N, hidden)."""
    targets: "Tensor"
    """(N,)."""
    layer: "nn.Module"
    after: "After"
    vocabulary: int
    tokens: int
    """Of the whole batch, padding with them."""

    def chunks(self) -> "Iterator[tuple[Tensor, Tensor]]":
        """Yield states and targets of a few tokens at a time."""
        import torch

        most = LOGITS[self.states.device.type] // self.vocabulary
        several = max(1, min(most, max(_FEW, self.tokens // _PART)))
        return zip(torch.split(self.states, several), torch.split(self.targets, several), strict=True)

    def logits(self, states: "Tensor") -> "Tensor":
        """(n, V) in the dtype of the model."""
        return self.after(self.layer(states))


@dataclass
class _Tap:
    """What an output layer was given and gave."""

    states: "list[Tensor]" = field(default_factory=list)
    """(N, hidden) at the wanted tokens."""
    raw: "list[Tensor]" = field(default_factory=list)
    """(1, n, V) at those that were let through."""


@contextmanager
def _tapped(model: "PreTrainedModel", wanted: "Tensor", *, most: int | None) -> "Iterator[_Tap]":
    """Let the output layer see the first wanted tokens alone, `most` of them: logits of a vocabulary are large."""
    tap = _Tap()

    def before(_: "nn.Module", inputs: "tuple[Tensor, ...]") -> "tuple[Tensor] | None":
        if inputs[0].shape[:2] != wanted.shape:
            return None
        tap.states.append(inputs[0][wanted])
        return (tap.states[0][:most][None],)

    layer = model.get_output_embeddings()
    with ExitStack() as stack:
        stack.callback(layer.register_forward_pre_hook(before).remove)
        stack.callback(layer.register_forward_hook(lambda *given: tap.raw.append(given[2])).remove)
        yield tap


def _forward(model: "PreTrainedModel", batch: "Batch") -> "Tensor":
    """The logits of a model, as far as its output layer is let to compute them."""
    # A mask of what is padding would keep transformers from making one that keeps packed sequences apart.
    seen = {"attention_mask": batch.mask} if batch.places is None else {"position_ids": batch.places}
    found: Tensor = model(input_ids=batch.ids, use_cache=False, **seen).logits
    return found


def _hidden(model: "PreTrainedModel", batch: "Batch", wanted: "Tensor") -> _Hidden | None:
    """None where the logits are more than a known function of the output layer's."""
    if model in _UNKNOWN:
        return None
    with _tapped(model, wanted, most=1) as tap:
        found = _forward(model, batch)
    after = _after(model, tap.raw[0], found) if len(tap.states) == len(tap.raw) == 1 else None
    if after is None:
        _UNKNOWN.add(model)
        return None
    layer, size = model.get_output_embeddings(), batch.ids.numel()
    return _Hidden(tap.states[0], batch.targets[wanted], layer, after, found.shape[-1], size)


def _after(model: "PreTrainedModel", raw: "Tensor", found: "Tensor") -> "After | None":
    """What a model did to the output layer's logits (1, n, V); None where it is nothing known."""
    import torch

    def gap(after: "After") -> float:
        return float((after(raw).float() - found.float()).abs().nan_to_num(0.0).max()) if found.numel() else 0.0

    if raw.shape != found.shape:
        return None
    with torch.no_grad():
        best = min(_known(model.config.get_text_config()), key=gap)
        rounding = 4 * torch.finfo(raw.dtype).eps * float(found.abs().nan_to_num(0.0).max()) if found.numel() else 0.0
        return best if gap(best) <= rounding else None


def _known(config: Any) -> "Iterator[After]":
    """What the fields of a config may mean for logits; last, that nothing is done."""
    for function, names in ((_capped, _CAPS), (mul, _FACTORS), (_divided, _DIVISORS)):
        yield from (partial(function, value) for name in names if (value := getattr(config, name, None)))
    yield pos


def _capped(cap: float, logits: "Tensor") -> "Tensor":
    return (logits / cap).tanh() * cap


def _divided(divisor: float, logits: "Tensor") -> "Tensor":
    return logits / divisor


def _summed(hidden: _Hidden) -> "Tensor":
    """The summed loss, whose gradient is computed along with it."""
    import torch

    trained = [parameter for parameter in hidden.layer.parameters() if parameter.requires_grad]
    if not (torch.is_grad_enabled() and (hidden.states.requires_grad or trained)):
        return torch.stack(
            [_scored(hidden.logits(states), targets)[:, 0].sum() for states, targets in hidden.chunks()]
        ).sum()
    total = torch.zeros((), device=hidden.states.device)
    of_states: list[Tensor] = []
    of_trained = [torch.zeros_like(parameter) for parameter in trained]
    for states, targets in hidden.chunks():
        states = states.detach().requires_grad_()
        logits = hidden.logits(states)
        losses, wrong = _wrong(logits.detach(), targets)
        total += losses
        scale = _FP16_SCALE if logits.dtype == torch.float16 else 1.0
        first, *others = torch.autograd.grad(logits, [states, *trained], wrong.mul_(scale).to(logits.dtype))
        of_states.append(first.float() / scale)
        for held, gradient in zip(of_trained, others, strict=True):
            held.add_(gradient, alpha=1 / scale)
    return _known_gradients(total, [hidden.states, *trained], [torch.cat(of_states), *of_trained])


def _wrong(logits: "Tensor", targets: "Tensor") -> "tuple[Tensor, Tensor]":
    """The summed loss of some tokens (n,), and its gradient with respect to their logits (n, V), in fp32."""
    import torch

    place = targets[:, None]
    scores = logits.log_softmax(-1, dtype=torch.float32)
    losses = -scores.gather(1, place).sum()
    return losses, scores.exp_().scatter_add_(1, place, torch.full_like(place, -1, dtype=torch.float32))


def _known_gradients(value: "Tensor", tensors: "list[Tensor]", gradients: "list[Tensor]") -> "Tensor":
    """A value whose gradients are known: those of the products added, of which nothing is left in the value."""
    for tensor, gradient in zip(tensors, gradients, strict=True):
        product = tensor.float().flatten().dot(gradient.flatten())
        value = value + (product - product.detach())
    return value


def _scored(logits: "Tensor", targets: "Tensor") -> "Tensor":
    """(n, 2) fp32: the loss of each of some tokens, and 1 where its target is the likeliest."""
    import torch
    from torch.nn.functional import cross_entropy

    losses = cross_entropy(logits.float(), targets, reduction="none")
    return torch.stack([losses, (logits.argmax(-1) == targets).float()], dim=-1)
