"""`lowres.json`, a bundle's passport: what it says of its base, its labels, its scores and every other file."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from lowres_ft import files, foreign
from lowres_ft.device import Dtype
from lowres_ft.errors import BundleError
from lowres_ft.plan import Plan
from lowres_ft.spec import Spec

PASSPORT = "lowres.json"
_LARGEST = 64 << 20  # bytes; it holds scores of each of 1,000 classes


class FileRecord(Spec):
    """What a file of a bundle must be."""

    sha256: str
    size: int


class BaseRecord(Spec):
    """The base that a bundle belongs to."""

    source: str
    """As the recipe named it."""
    name: str
    """As other programs can load it."""
    revision: str | None
    config_sha256: str
    weights_sha256: str
    tokenizer_sha256: str


class Passport(Spec):
    """`lowres.json`: what a bundle says of itself."""

    format: Literal[1] = 1
    base: BaseRecord
    task: str
    labels: tuple[str, ...]
    method: str
    quantize: str
    dtype: Dtype
    """What computed in training; evaluation and prediction compute in it too."""
    plan: Plan
    scores: dict[str, Any]
    data: dict[str, str]
    """A hash of each split's rows."""
    versions: dict[str, str]
    machine: str
    host: str
    """Hash of the host that wrote the bundle, where its logits repeat to the bit."""
    files: dict[str, FileRecord] = Field(default={})
    """Every other file of the bundle."""
    digest: str = ""
    """Hash of all the rest of the passport; bundles of earlier versions have none."""


def read(path: Path) -> Passport:
    """A passport of the form that this version knows.

    Raises:
        BundleError: It has another one.
    """
    try:
        return Passport.model_validate_json(foreign.read_bytes(path, _LARGEST, BundleError))
    except ValidationError as error:
        first = error.errors()[0]
        where = ": ".join(filter(None, [str(path), ".".join(map(str, first["loc"]))]))
        raise BundleError(f"{where}: {first['msg']}", hint="It is damaged, or of a newer format.") from error


def require_whole(path: Path) -> None:
    """Compare a passport with its own hash, as it is written: a later version may know more keys.

    Raises:
        BundleError: It was changed.
    """
    content = foreign.read_json(path, _LARGEST, BundleError)
    if (digest := content.pop("digest", "")) and digest != _digest(content):
        raise BundleError(f"{path} is not what it was when it was written", hint="Ask for the bundle again.")


def write(path: Path, passport: Passport, records: dict[str, FileRecord]) -> Passport:
    """Write a passport that vouches for files; return it as it is written."""
    whole = passport.model_copy(update={"files": records})
    content = whole.model_dump(mode="json", exclude={"digest"})
    digest = _digest(content)
    files.write_json(path, content | {"digest": digest})
    return whole.model_copy(update={"digest": digest})


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
