"""Checkpoints: all that the rest of a run depends on, in safetensors and JSON, whole or not there.

Each is a folder `checkpoints/<step>-<evaluations>` with `tensors.safetensors` (the trained tensors, the optimizer's,
the best step's, the figures of every step so far), `state.json` (all that is no tensor, and the plan) and, written
last, `manifest.json` with each file's size and hash. Without a manifest that holds there is no checkpoint. Where the
data go on follows from the step, and nothing random is kept: see `train`.
"""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowres_ft import files
from lowres_ft.errors import OutputError
from lowres_ft.plan import Plan
from lowres_ft.shortage import Room
from lowres_ft.sizes import show_bytes
from lowres_ft.train import Step, TrainState

_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_KEPT = 2  # the newest one, and one to fall back to
_HISTORY = "history"
_ROOM = ("training", "evaluation")


@dataclass
class Record:
    """What a run has done so far, beside what its state holds."""

    steps: list[Step] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    """Steps and the first metric on validation after them."""
    peak_bytes: int = 0

    def evaluated(self, step: int) -> bool:
        """Whether the evaluation after a step is done."""
        return bool(self.evaluations) and self.evaluations[-1][0] == step


@dataclass(frozen=True)
class Contents:
    """A checkpoint that is not written yet."""

    name: str
    tensors: dict[str, Tensor]
    values: dict[str, Any]

    @property
    def bytes(self) -> int:
        """What its tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def copied(self) -> "Contents":
        """The same in tensors of its own on the processor, which training does not change."""
        own = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors.items()}
        return Contents(self.name, own, self.values)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Path
    values: Mapping[str, Any]

    @property
    def step(self) -> int:
        """The last step that it holds."""
        return int(self.values["step"])

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return int(self.values["total"])

    @property
    def plan(self) -> Plan:
        """How its steps were computed."""
        return Plan.model_validate_json(json.dumps(self.values["plan"]))


def contents(state: TrainState, record: Record, plan: Plan) -> Contents:
    """What a checkpoint of a state holds; tensors are those that training goes on with."""
    tensors: dict[str, Tensor] = {}
    values = {
        "format": 1,
        "step": state.step,
        "total": state.total,
        "plan": plan.model_dump(mode="json"),
        "peak_bytes": record.peak_bytes,
        "room": {name: getattr(state.adapted.room, name) for name in _ROOM},
        "state": _taken_apart(state.state_dict(copied=False), "state", tensors),
    }
    if record.steps:
        tensors[f"{_HISTORY}/steps"] = torch.tensor([astuple(step) for step in record.steps], dtype=torch.float64)
    if record.evaluations:
        tensors[f"{_HISTORY}/evaluations"] = torch.tensor(record.evaluations, dtype=torch.float64)
    return Contents(f"{state.step:08d}-{len(record.evaluations):05d}", tensors, values)


def save(found: Contents, folder: Path) -> Path:
    """Write a checkpoint into `folder`, then remove all but the newest two.

    Raises:
        OutputError: It cannot be written; those that were there stay.
    """
    place = folder / found.name
    if not place.exists():
        with files.draft(place) as made:
            with files.writing(place):
                save_file(_storable(found.tensors), made / _TENSORS)
            files.write_json(made / _STATE, found.values)
            written = {
                name: {"sha256": files.sha256(made / name), "size": (made / name).stat().st_size}
                for name in (_TENSORS, _STATE)
            }
            files.write_json(made / _MANIFEST, written)
            files.publish(made, place)
    for older in _complete(folder)[_KEPT:]:
        files.remove(older / _MANIFEST)  # first, so that one that is half removed is none
        files.remove(older)
    return place


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are as its manifest says, and what is wrong with newer ones."""
    damaged = []
    for place in _complete(folder):
        try:
            manifest = json.loads((place / _MANIFEST).read_bytes())
            for name in (_TENSORS, _STATE):
                if files.sha256(place / name) != manifest[name]["sha256"]:
                    raise ValueError(f"{name} was changed")
            found = Checkpoint(place, json.loads((place / _STATE).read_bytes()))
            _ = (found.step, found.total, found.plan)
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            damaged.append(f"{place} is damaged: {str(error).splitlines()[0]}")
            continue
        return found, damaged
    return None, damaged


def load(checkpoint: Checkpoint, state: TrainState, plan: Plan) -> Record:
    """Put a state back to where a checkpoint was made; return what was done until then.

    Raises:
        ModelError: It is of another model.
    """
    tensors = load_file(checkpoint.folder / _TENSORS)
    held = _put_together(checkpoint.values["state"], tensors)
    room = _smaller(checkpoint.values["room"], state.adapted.room)
    if plan.dtype != checkpoint.plan.dtype:  # the scale of losses belongs to the dtype
        held["numbers"] |= {"loss_scale": state.loss_scale, "steps_at_scale": 0}
    for group, own in zip(held["optimizer"]["param_groups"], state.optimizer.param_groups, strict=True):
        group |= {name: own[name] for name in ("fused", "foreach", "capturable") if name in own}  # the plan's
    device = state.adapted.device
    if held["best"] is not None:
        held["best"] = {name: tensor.to(device) for name, tensor in held["best"].items()}
    state.load_state_dict(held)
    for name, most in room.items():
        setattr(state.adapted.room, name, most)
    steps = tensors.get(f"{_HISTORY}/steps", torch.empty(0, 7)).tolist()
    evaluations = tensors.get(f"{_HISTORY}/evaluations", torch.empty(0, 2)).tolist()
    return Record(
        [_step(row) for row in steps],
        [(int(step), value) for step, value in evaluations],
        int(checkpoint.values["peak_bytes"]),
    )


def _smaller(then: Mapping[str, int | None], now: Room) -> dict[str, int | None]:
    """What fits of each, by what did not fit before a checkpoint and what did not now: neither is tried again."""
    found = {name: [size for size in (then[name], getattr(now, name)) if size is not None] for name in _ROOM}
    return {name: min(sizes, default=None) for name, sizes in found.items()}


def discard(folder: Path) -> None:
    """Remove what is no complete checkpoint, and those that are newer than the newest good one."""
    if folder.is_dir():
        good, _ = newest(folder)
        for place in folder.iterdir():
            if good is None or place.name > good.folder.name or place not in _complete(folder):
                files.remove(place)


def _complete(folder: Path) -> list[Path]:
    """Folders of checkpoints, newest first."""
    if not folder.is_dir():
        return []
    found = (place for place in folder.iterdir() if not files.is_draft(place.name))
    return sorted((place for place in found if (place / _MANIFEST).is_file()), reverse=True)


def _step(row: list[float]) -> Step:
    number, loss, rate, norm, examples, tokens, seconds = row
    return Step(int(number), loss, rate, norm, int(examples), int(tokens), seconds)


def _storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the processor, none of which shares memory with another."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        found[name] = own.clone() if place in seen or own.untyped_storage().nbytes() != own.nbytes else own
        seen.add(place)
    return found


def _taken_apart(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A nested value as JSON, its tensors put aside under their paths; keys keep their types, floats their bits."""
    match value:
        case Tensor():
            tensors[path] = value
            return {"tensor": path}
        case dict():
            return {"items": [[key, _taken_apart(one, f"{path}/{key}", tensors)] for key, one in value.items()]}
        case list() | tuple():
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [_taken_apart(one, f"{path}/{at}", tensors) for at, one in enumerate(value)]}
        case float() if not math.isfinite(value):
            return {"float": repr(value)}
    return value


def _put_together(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `_taken_apart` took apart."""
    match value:
        case {"tensor": path}:
            return tensors[path]
        case {"items": items}:
            return {key: _put_together(one, tensors) for key, one in items}
        case {"list": parts}:
            return [_put_together(one, tensors) for one in parts]
        case {"tuple": parts}:
            return tuple(_put_together(one, tensors) for one in parts)
        case {"float": text}:
            return float(text)
    return value


def require_room(folder: Path, needed: int) -> None:
    """Refuse to begin where the disk cannot take what a run writes.

    Raises:
        OutputError: It has less room than `needed` bytes.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder}: the bundle and the checkpoints need {show_bytes(needed)}, and {show_bytes(free)} are free",
            hint="Make room, choose another place with --out, or use train.checkpoint_every=none.",
        )
