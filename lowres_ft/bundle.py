"""Bundles: an adapter that any PEFT client reads, and a passport that knows its base, its labels and its scores."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as bytes_from
from torch import Tensor

from lowres_ft import bases, behaviour, folders, foreign, limits, model, profiles, recipe
from lowres_ft import passport as passports
from lowres_ft import plan as plans
from lowres_ft.assets import Progress
from lowres_ft.bases import Base
from lowres_ft.border import peft_config, peft_tensors, read_adapter, read_config, read_tensors, require_as_saved
from lowres_ft.device import Dtype, Machine, versions
from lowres_ft.errors import BundleError, LowresError, ModelError
from lowres_ft.files import sha256, write_bytes, write_json, writing
from lowres_ft.model import Adapted
from lowres_ft.passport import PASSPORT, BaseRecord, FileRecord, Passport
from lowres_ft.plan import Plan
from lowres_ft.probes import Probe
from lowres_ft.profiles import Profile
from lowres_ft.recipe import Recipe
from lowres_ft.tokenizing import load_tokenizer

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PROBE = "probe.safetensors"
_LOADED = (
    *("*.safetensors", "*.bin", "*.pt", "*.pkl", "*.model", "*.jinja", "additional_chat_templates"),
    *("*config.json", "*.index.json", "token*.json", "special*.json", "added*.json", "vocab.*", "merges.txt"),
)
"""Files that transformers or PEFT would read, by name."""
_LOADING = 1.5  # times its weights, that a model may take as it is loaded: the largest is there twice
_TOLERANCE = 1e-3  # of fp32 logits, on another machine or with other versions
_RELOADED = 2e-2  # of logits in the dtype trained in; a lost head or a wrong name moves them by whole units


@dataclass(frozen=True)
class Bundle:
    """A folder that holds what training made."""

    folder: Path
    passport: Passport
    recipe: Recipe

    def base(self, place: str | None = None, progress: Progress | None = None) -> Base:
        """Find the base, at `place` or where the recipe says, and make sure that it is the one recorded.

        Raises:
            BundleError: Another base lies there.
            ModelError, AssetError: There is none.
        """
        spec = self.recipe.model
        if place is None and spec.base == self.passport.base.name:  # on the Hub, the very commit
            spec = spec.model_copy(update={"revision": self.passport.base.revision})
        elif place is not None:
            spec = spec.model_copy(update={"base": place, "revision": None})
        try:
            found = bases.resolve(spec, progress)
        except LowresError as error:
            hint = f"{error.hint} If the base lies elsewhere, say where with --base."
            raise type(error)(error.message, hint=hint) from error
        recorded = self.passport.base
        for what, digest in found.identity().items():
            if digest != getattr(recorded, what):
                raise BundleError(
                    f"{self.folder} was trained on {recorded.source} ({what} {getattr(recorded, what)[:12]}...), "
                    f"but the base at {found.folder} is another one ({what} {digest[:12]}...)",
                    hint="Give the right base with --base.",
                )
        return found

    def load(
        self,
        machine: Machine,
        *,
        dtype: Dtype | None = None,
        quantize: str | None = None,
        base: str | None = None,
        progress: Progress | None = None,
        room: int | None = None,
    ) -> tuple[Adapted, Plan]:
        """Load the model as it was trained and measured, or in another dtype or storage.

        Where it may need more than `room` bytes, layers pass if they can, which changes no bit of what it computes.
        An adapter that corrects quantization belongs to the quantized base: for it, `quantize="none"` means the weights
        that the quantized base computes with, held plain.

        Raises:
            BundleError: The base is another one, or the tensors do not fit it.
        """
        if self.recipe.method.trains_base:
            found = Base(str(self.folder), self.folder, str(self.folder))
        else:
            found = self.base(base, progress)
        dequantize = quantize == "none" and self.recipe.method.corrects_quantization
        changed: dict[str, Any] = {
            "quantize_embeddings": quantize != "none" and self.recipe.model.quantize_embeddings,
            "quantize": self.passport.quantize if dequantize else quantize or self.passport.quantize,
            "dtype": dtype or self.passport.dtype,
        }
        wanted = self.recipe.model_copy(update={"model": self.recipe.model.model_copy(update=changed)})
        profile = profiles.profile(found, wanted.task)
        plan = self._plan(wanted, profile, machine, room)
        adapted = model.load(wanted, found, profile, plan, load_tokenizer(self.folder), new=False)
        if dequantize:
            model.dequantize(adapted)
        if not self.recipe.method.trains_base:
            try:
                adapted.restore(read_adapter(self.folder / ADAPTER))
            except ModelError as error:
                raise BundleError(f"{self.folder / ADAPTER}: {error.message}") from error
        return adapted, behaviour.revise(adapted, plan)[0]

    def _plan(self, wanted: Recipe, profile: Profile, machine: Machine, room: int | None) -> Plan:
        """How a machine runs it in some dtype and storage, within so many bytes if it can."""
        plan = plans.make(wanted, profile, machine, like=self.passport.plan)
        tight = room is not None and _LOADING * getattr(torch, plan.dtype).itemsize * profile.parameters > room
        if tight and wanted.budget.offload != "none" and not plans.why_resident(wanted, profile, machine.kind):
            return plan.model_copy(update={"offload": "layers"})
        return plan

    def probe(self) -> Probe | None:
        """The probe rows; None where the bundle was made without."""
        path = self.folder / PROBE
        if not path.is_file():
            return None
        return Probe.of(read_tensors(path), path)

    def verify(self, machine: Machine, base: str | None = None, progress: Progress | None = None) -> "Verified":
        """Compare the probe rows' logits with those recorded; `open_bundle` has compared the hashes.

        Raises:
            BundleError: They differ by more than they may.
        """
        needs_base = not self.recipe.method.trains_base
        probed = self.probe()
        if probed is None:
            if needs_base:
                self.base(base, progress)
            return Verified(len(self.passport.files), needs_base, 0, None, exact=False)
        adapted, plan = self.load(machine, dtype="float32", base=base, progress=progress)
        if needs_base:
            require_as_saved(adapted, self.folder / ADAPTER_CONFIG)
        found = probed.logits(adapted)
        recorded = read_tensors(self.folder / PROBE)["logits"]
        if found.shape != recorded.shape:
            raise BundleError(
                f"{self.folder / PROBE} holds logits of {tuple(recorded.shape)}, not {tuple(found.shape)}"
            )
        gap = float((found - recorded).abs().max())
        ours = self.passport
        same = (ours.host, ours.plan.device, ours.versions, ours.plan.threads) == (
            machine.host,
            plan.device,
            versions(),
            plan.threads,
        )
        if not gap <= (0.0 if same else _TOLERANCE):
            raise BundleError(
                f"{self.folder}: the logits of the probe rows differ from those recorded by up to {gap:.2g}",
                hint="The adapter does not do here what it did where it was made; see `lowres.json` for versions.",
            )
        return Verified(len(ours.files), needs_base, len(found), gap, exact=same)


@dataclass(frozen=True)
class Verified:
    """What `verify` compared."""

    files: int
    base: bool
    """False for a bundle that is a whole model, which needs no base."""
    probe_rows: int
    largest_difference: float | None
    """Of the probe rows' fp32 logits; None without a probe."""
    exact: bool
    """True on the machine and versions that wrote the bundle, where bit-equality was asked for."""


def open_bundle(folder: str | Path) -> Bundle:
    """Read a bundle and compare every file with its passport.

    Raises:
        BundleError: It is no bundle, or a file is missing or changed.
    """
    folder = Path(folder)
    if not os.path.isfile(folder / PASSPORT):  # os.path: a name that no system can have is not there either
        packed = os.path.isfile(folder)
        found = "is a file" if packed else f"holds no {PASSPORT}" if os.path.exists(folder) else "is not there"
        hint = "A bundle is a folder: unpack it first." if packed else "`lowres-ft recipe NAME` makes one."
        raise BundleError(f"{folder} {found}, so it is no bundle", hint=hint)
    passport = passports.read(folder / PASSPORT)
    for name, record in passport.files.items():
        path = foreign.require_inside(folder, name, BundleError)
        if not path.is_file():
            raise BundleError(f"{folder} lacks {name}", hint="Ask for the whole bundle again.")
        if path.stat().st_size != record.size or sha256(path) != record.sha256:
            raise BundleError(f"{path} is not what {PASSPORT} says: it was changed", hint="Ask for the bundle again.")
    _require_listed(folder, passport)
    loaded = recipe.load_recipe(folder / "recipe.yaml")
    bundle = Bundle(folder, passport, loaded)
    _agree(bundle)
    passports.require_whole(folder / PASSPORT)  # last: what is wrong is told by its name where it has one
    return bundle


def _require_listed(folder: Path, passport: Passport) -> None:
    """Refuse a bundle without its recipe or weights, and files that a loader would read but nobody vouches for."""
    adapter = () if passport.method == "full" else (ADAPTER, ADAPTER_CONFIG)
    for name in ("recipe.yaml", *adapter):
        if name not in passport.files:
            raise BundleError(f"{folder / PASSPORT} names no {name}", hint="Ask for the whole bundle again.")
    for path in sorted(folder.iterdir()):
        if path.name not in passport.files and any(path.match(pattern) for pattern in _LOADED):
            raise BundleError(f"{path} is not named in {PASSPORT}, and would be loaded", hint="Remove it.")


def _agree(bundle: Bundle) -> None:
    """Compare what the passport says with the recipe."""
    ours, theirs = bundle.passport, bundle.recipe
    said = {
        "task": (ours.task, theirs.task.kind),
        "method": (ours.method, theirs.method.kind),
        "quantize": (ours.quantize, theirs.model.quantize),
        "labels": (ours.labels, theirs.task.names),
    }
    for what, (passport, held) in said.items():
        if passport != held:
            raise BundleError(f"{bundle.folder}: {what} is {passport} in {PASSPORT} but {held} in recipe.yaml")
    if theirs.method.trains_base:
        return
    path = bundle.folder / ADAPTER_CONFIG
    if (named := read_config(path).get("base_model_name_or_path")) != ours.base.name:
        raise BundleError(f"{path}: the base is {named} there but {ours.base.name} in {PASSPORT}")


def write(folder: Path, adapted: Adapted, resolved: Recipe) -> None:
    """Write weights, tokenizer and recipe into a bundle's folder."""
    if resolved.method.trains_base:
        with writing(folder):
            folders.save_plain(adapted, folder)
    else:
        write_bytes(folder / ADAPTER, bytes_from(peft_tensors(adapted), metadata={"format": "pt"}))
        write_json(folder / ADAPTER_CONFIG, peft_config(adapted))
    tokenizer = load_tokenizer(adapted.base.folder)
    resolved.task.prepare(tokenizer)
    with writing(folder):
        tokenizer.save_pretrained(folder)
    write_bytes(folder / "recipe.yaml", resolved.to_yaml().encode())


def seal(bundle: Bundle, machine: Machine, probed: Probe | None, expected: Tensor | None) -> Bundle:
    """Load a written bundle anew, see that it computes what was measured, and write probe and passport, the last file.

    Its logits are recorded in fp32, for which weights may take twice what they took in training: where a bound leaves
    too little for that, layers pass.

    Raises:
        BundleError: The reloaded model's logits are not those of the trained one.
    """
    if probed is not None and expected is not None:
        _require_same(bundle, machine, probed, expected)
        limits.trim()  # of that model
        reference, _ = bundle.load(machine, dtype="float32", room=limits.left())
        write_bytes(bundle.folder / PROBE, bytes_from(probed.tensors() | {"logits": probed.logits(reference)}))
    files = {path.name: _record(path) for path in sorted(bundle.folder.iterdir()) if path.name != PASSPORT}
    return replace(bundle, passport=passports.write(bundle.folder / PASSPORT, bundle.passport, files))


def _require_same(bundle: Bundle, machine: Machine, probed: Probe, expected: Tensor) -> None:
    """See that a written bundle computes what was measured. The model is freed with this function.

    Raises:
        BundleError: It does not.
    """
    adapted, _ = bundle.load(machine, room=limits.left())
    gap = float((probed.logits(adapted) - expected).abs().max())
    if not gap <= _RELOADED:
        raise BundleError(f"the saved adapter, loaded again, changes logits by up to {gap:.2g}; nothing was kept")


def adapter_bytes(folder: Path) -> int:
    """Size of the weights in a bundle's folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.name != PROBE)


def _record(path: Path) -> FileRecord:
    return FileRecord(sha256=sha256(path), size=path.stat().st_size)


def passport(
    adapted: Adapted, resolved: Recipe, plan: Plan, machine: Machine, scores: dict[str, Any], data: dict[str, str]
) -> Passport:
    """The passport of a trained model, without its files."""
    base = adapted.base
    return Passport(
        base=BaseRecord(source=base.source, name=base.name, revision=base.revision, **base.identity()),
        task=resolved.task.kind,
        labels=resolved.task.names,
        method=resolved.method.kind,
        quantize=resolved.model.quantize,
        dtype=plan.dtype,
        plan=plan,
        scores=scores,
        data=data,
        versions=versions(),
        machine=machine.name,
        host=machine.host,
    )
