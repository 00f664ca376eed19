"""Pretrained bases: where one lies, what other programs call it, and by which hashes it is known again."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowres_ft import assets, foreign, gguf, libraries
from lowres_ft.errors import AssetError, ModelError, first_line, nearest
from lowres_ft.files import cached_sha256
from lowres_ft.parts import ModelSpec

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_NOT_FROM_HUB = ["*/*", "consolidated*"]  # other forms of the same weights
_CONVERT = (
    "Pickled weights are not read, because they can run code. Where you trust them, convert them in a place of their "
    "own: AutoModel.from_pretrained(FOLDER).save_pretrained(NEW) of transformers writes model.safetensors."
)
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
"""Files of which a tokenizer has at least one."""
_INDEX = "model.safetensors.index.json"
_LARGEST_JSON = 64 << 20  # bytes of a config, or of an index of shards
_CODE = ("config.json", "tokenizer_config.json", "processor_config.json")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.msgpack", "*.gguf")


@dataclass(frozen=True)
class Base:
    """A pretrained model in a folder."""

    source: str
    """As the recipe names it."""
    folder: Path
    name: str
    """A name that other programs can load: a Hub id where its bytes are the pinned ones, else the folder."""
    revision: str | None = None

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return foreign.read_json(self.folder / "config.json", _LARGEST_JSON, ModelError)

    def identity(self) -> dict[str, str]:
        """Hashes of the config, the vocabulary and the weights.

        For shards, the last one is that of the sorted list of names and hashes; for what was converted, the original's.
        """
        hashes = [(name, cached_sha256(self.folder / name)) for name in weight_files(self.folder)]
        listed = "".join(f"{digest}  {name}\n" for name, digest in hashes)
        weights = hashes[0][1] if len(hashes) == 1 else hashlib.sha256(listed.encode()).hexdigest()
        weights = gguf.origin(self.folder, weights)
        return {
            "config_sha256": cached_sha256(self.folder / "config.json"),
            "weights_sha256": weights,
            "tokenizer_sha256": self._tokenizer_hash(),
        }

    def _tokenizer_hash(self) -> str:
        """Hash of the file that holds the vocabulary; empty without one."""
        found = [path for pattern in VOCABULARIES for path in sorted(self.folder.glob(pattern))]
        return cached_sha256(found[0]) if found else ""


def resolve(spec: ModelSpec, progress: assets.Progress | None = None) -> Base:
    """Find a base: a starter (fetched if need be), a folder, or a model of the Hub.

    Raises:
        AssetError: It cannot be fetched.
        ModelError: What is there is no model with safetensors weights.
    """
    found = _found(spec, progress, _HUB_FILES)
    _require_weights(found)
    return found


def _found(spec: ModelSpec, progress: assets.Progress | None, patterns: list[str]) -> Base:
    base = spec.base
    expanded = Path(os.path.expanduser(base))  # as given, where there is no such user
    if spec.revision is not None and (base.startswith("starter:") or os.path.isdir(expanded)):
        raise ModelError(f"model.revision is for bases of the Hub, and {base} is none", hint="Leave it out.")
    if base.startswith("starter:"):
        found = _starter(base, progress)
    elif os.path.isdir(expanded):  # os.path: a name that no system can have is a folder that is not there
        found = Base(base, expanded, str(expanded.resolve()))
    elif os.path.isfile(expanded):
        raise ModelError(f"model.base: {base} is a file; a base is a folder with config and tokenizer", hint=_CONVERT)
    elif base.startswith((".", "/", "~")) or len(Path(base).parts) > 2:
        raise ModelError(f"model.base: no folder {base}", hint=f"The current folder is {Path.cwd()}.")
    else:
        found = _hub(base, spec.revision, patterns)
    _require_model(found)
    return found


def glance(spec: ModelSpec, progress: assets.Progress | None = None) -> Base:
    """Find a base of which the config is enough: no weights are fetched from the Hub, or asked of a folder.

    Raises:
        AssetError: It cannot be fetched.
        ModelError: There is no config.
    """
    return _found(spec, progress, ["config.json"])


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold a model's weights, sorted; none where it has no safetensors.

    Raises:
        ModelError: The index of its shards is broken, names a file that is missing, or leaves the folder.
    """
    if (folder / "model.safetensors").is_file():  # which transformers takes before shards
        return ["model.safetensors"]
    index = folder / _INDEX
    if not index.is_file():
        return []
    try:
        shards = sorted(set(foreign.read_json(index, _LARGEST_JSON, ModelError)["weight_map"].values()))
    except (ModelError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is no index of weights: {error}") from error
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or not os.path.isfile(folder / shard):
            raise ModelError(f"{index} names {shard!r}, which is not a file of that folder")
    return shards


def _starter(base: str, progress: assets.Progress | None) -> Base:
    starter = assets.starter(base.removeprefix("starter:"))
    if not starter.is_model:
        raise ModelError(f"{base} is data, not a model", hint="Use it as data.train.")
    folder = assets.fetch(starter.asset, progress)
    name, _, revision = (starter.asset.hub or str(folder)).partition("@")
    return Base(base, folder, name, revision or None)


def _hub(base: str, revision: str | None, patterns: list[str]) -> Base:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    starters = [f"starter:{name}" for name, starter in assets.STARTERS.items() if starter.is_model]
    try:
        with libraries.quiet_hub():
            found = snapshot_download(base, revision=revision, allow_patterns=patterns, ignore_patterns=_NOT_FROM_HUB)
    except HFValidationError as error:
        known = f"Starters are {', '.join(starters)}; a Hub id is OWNER/NAME."
        told = f"model.base: '{base}' is neither a folder nor a Hub id{nearest(base, starters)}"
        raise ModelError(told, hint=known) from error
    except Exception as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise AssetError(
            f"model.base: '{base}' cannot be had from the Hub{offline}: {first_line(error)}",
            hint=f"Without a network, use a folder or a starter: {', '.join(starters)}.",
        ) from error
    folder = Path(found)
    return Base(base, folder, base, folder.name)  # the folder is called like the commit


def _require_model(base: Base) -> None:
    if not (base.folder / "config.json").is_file():
        raise ModelError(f"{base.folder} holds no config.json, so it is no transformers model")
    if (base.folder / "adapter_config.json").is_file():
        raise ModelError(f"{base.folder} holds an adapter, not a whole model", hint="Merge it first: lowres-ft merge.")
    for path in sorted(base.folder.iterdir()):
        if path.is_symlink() and any(path.match(pattern) for pattern in _HUB_FILES):
            foreign.require_inside(base.folder, path.name, ModelError)
    require_no_code(base.folder)


def require_no_code(folder: Path) -> None:
    """Refuse what asks transformers to run Python that lies beside it.

    Raises:
        ModelError: A file has an `auto_map`, or cannot be read.
    """
    for name in _CODE:
        path = folder / name
        if path.is_file() and foreign.read_json(path, _LARGEST_JSON, ModelError).get("auto_map"):
            raise ModelError(
                f"{path} names code of its own (auto_map), which is never run",
                hint="Where transformers knows the model by itself, remove auto_map from a copy of the file.",
            )


def _require_weights(base: Base) -> None:
    if not weight_files(base.folder):
        others = sorted(path.name for ending in _PICKLED for path in base.folder.glob(ending))
        held = f", only {', '.join(others)}" if others else ""
        raise ModelError(f"{base.folder} holds no .safetensors weights{held}", hint=_CONVERT)
