"""lowres-ft: its layers, its plan and its loop, on a model whose weights are random."""

import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.job import Clock
from benchmarks.on_gpu import setting
from benchmarks.on_gpu.setting import Ready, Setting
from lowres_ft import device, embedding, model, plan, profiles, quantize, train
from lowres_ft.model import Loaded
from lowres_ft.plan import Plan
from lowres_ft.streaming import Slots

_TIMED_HERE = "products"  # an attention whose kernels are timed, on processors


def build(found: Setting) -> Ready:
    """Make the model and the state before the first step."""
    machine = device.find(found.job.device)
    resolved = _plan(found, plan.make(found.recipe, found.profile, machine))
    loaded = Loaded(_model(found, resolved), _tokenizer(), found.profile.heads)
    adapted = model.adapt(found.recipe, found.base, found.profile, resolved, loaded)
    rows = setting.tokens(found)
    state = train.start(found.recipe, adapted, rows, resolved)

    def run(clock: Clock) -> list[float]:
        losses = []
        for step in train.train(state, rows, resolved, machine):
            clock.step(step.tokens)
            losses.append(step.loss)
        return losses

    trained = sum(parameter.numel() for parameter in adapted.trained().values())
    place = adapted.stream.place if adapted.stream else None
    copied = (lambda: place.copied) if isinstance(place, Slots) else None
    return Ready(run, trained, resolved.model_dump(mode="json"), copied)


def _plan(found: Setting, made: Plan) -> Plan:
    """The plan that was made, but for what the way says."""
    way = found.job.way
    changes: dict[str, object] = {}
    if made.attention == _TIMED_HERE:
        changes["attention"] = "sdpa"
    if way.row_by_row:
        changes["micro_batch_tokens"] = found.job.row
    if way.recompute != "own":
        changes["recompute"] = way.recompute
    if way.kernel != "own":
        changes["int8"] = way.kernel
    if way.passing:
        changes["offload"] = "layers"
    return made.model_copy(update=changes)


def _model(found: Setting, resolved: Plan) -> PreTrainedModel:
    made = setting.empty_model(found, resolved.attention)
    spec, dtype = found.recipe.model, getattr(torch, resolved.dtype)
    forms: dict[str, str] = {}
    if spec.quantize != "none":
        forms = {name: spec.quantize for name, _ in profiles.linear_layers(made, found.profile.outside)}
    if spec.quantize_embeddings:
        forms |= dict.fromkeys(embedding.layers(made), "int8")

    place = torch.device("cpu" if resolved.offload == "layers" else resolved.device)

    def held(name: str, value: Tensor) -> nn.Parameter:
        form = forms.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if form is not None:
            room = quantize.empty(value.shape, form, place)
            quantize.fill(room, value)
            return quantize.parameter(room)
        return nn.Parameter(value.to(place, dtype), requires_grad=False)

    setting.fill(made, resolved.device, held)
    return made


def _tokenizer() -> PreTrainedTokenizerFast:
    """One that knows nothing but which token pads."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[PAD]": 0}, "[PAD]")), pad_token="[PAD]"
    )
