"""Where a base lies, what other programs call it, and by which hashes it is known again."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from transformers import AutoModel

from lowres_ft import bases as module
from lowres_ft.errors import AssetError, LowresError, ModelError
from lowres_ft.parts import ModelSpec
from tests import tiny

Bases = Callable[..., Path]


def resolve(base: str | Path, **fields: Any) -> module.Base:
    return module.resolve(ModelSpec(base=str(base), **fields))


def test_a_folder_is_known_by_its_path_and_hashes(bases: Bases):
    folder = bases("bert")
    found = resolve(folder)
    assert (found.folder, found.name, found.revision) == (folder, str(folder.resolve()), None)
    assert found.identity() == {
        "config_sha256": sha256((folder / "config.json").read_bytes()).hexdigest(),
        "weights_sha256": sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "tokenizer_sha256": sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
    }


def test_shards_are_known_by_the_list_of_their_names_and_hashes(bases: Bases, tmp_path: Path):
    AutoModel.from_pretrained(bases("bert")).save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    listed = "".join(f"{sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}\n" for name in shards)
    (tmp_path / "consolidated.safetensors").write_bytes(b"another form of the same weights")
    assert resolve(tmp_path).identity()["weights_sha256"] == sha256(listed.encode()).hexdigest()


def test_converted_weights_are_known_by_their_original(tmp_path: Path):
    folder = tiny.base(tmp_path / "base")
    own = resolve(folder).identity()
    weights = folder / "model.safetensors"
    noted = {"file": "a.gguf", "sha256": "0" * 64, "converted": {weights.name: own["weights_sha256"]}}
    (folder / "origin.json").write_text(json.dumps(noted))
    assert resolve(folder).identity() == own | {"weights_sha256": "0" * 64}
    weights.write_bytes(changed := weights.read_bytes() + b" ")
    assert resolve(folder).identity()["weights_sha256"] == sha256(changed).hexdigest()


@pytest.mark.parametrize("origin", ["", "[]", "{}", '{"sha256": "0"}', '{"sha256": "0", "converted": []}'])
def test_an_origin_that_says_nothing_is_passed_over(tmp_path: Path, origin: str):
    folder = tiny.base(tmp_path / "base")
    own = resolve(folder).identity()
    (folder / "origin.json").write_text(origin)
    assert resolve(folder).identity() == own


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "missing.safetensors", 3])
def test_an_index_that_leaves_its_folder_is_refused(bases: Bases, tmp_path: Path, shard: object):
    folder = tiny.base(tmp_path / "base")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ModelError, match="which is not a file of that folder"):
        resolve(folder)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_refused(tmp_path: Path, index: str):
    folder = tiny.base(tmp_path / "base")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match="is no index of weights"):
        resolve(folder)


@pytest.mark.parametrize(
    ("base", "kind", "message"),
    [
        ("starter:minilm", AssetError, "no starter 'minilm' (did you mean 'minilm-l6'?)"),
        ("starter:imdb", ModelError, "starter:imdb is data, not a model"),
        ("./nowhere", ModelError, "no folder ./nowhere"),
        ("/nowhere/at/all", ModelError, "no folder /nowhere/at/all"),
        ("not a name!", ModelError, "'not a name!' is neither a folder nor a Hub id"),
        ("someone/some-model", AssetError, "cannot be had from the Hub (HF_HUB_OFFLINE is set)"),
    ],
)
def test_a_base_that_is_not_there_is_told(base: str, kind: type[LowresError], message: str):
    with pytest.raises(kind) as caught:
        resolve(base)
    assert message in caught.value.message
    assert caught.value.hint


def test_a_folder_that_is_no_model_is_told(tmp_path: Path):
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        resolve(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"no \.safetensors weights, only pytorch_model\.bin"):
        resolve(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter"):
        resolve(tmp_path)


def test_a_revision_is_for_the_hub(bases: Bases):
    with pytest.raises(ModelError, match=r"model\.revision is for bases of the Hub"):
        resolve(bases("bert"), revision="main")


def test_a_hub_model_is_named_by_its_id_and_commit(bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}
    folder = tiny.base(tmp_path / "0123abcd")

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = resolve("someone/some-model", revision="main")
    assert (found.name, found.revision) == ("someone/some-model", "0123abcd")
    assert (asked["name"], asked["revision"]) == ("someone/some-model", "main")
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked["allow_patterns"])


def test_an_unknown_architecture_is_told(tmp_path: Path, reviews: Path):
    from lowres_ft.pipeline import run
    from tests.conftest import recipe

    folder = tiny.base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bretzel"}))
    with pytest.raises(ModelError, match="cannot read its config \\(model_type 'bretzel'\\)"):
        run(recipe(folder, reviews), tmp_path / "bundle", device_name="cpu")


def test_a_base_without_a_tokenizer_is_told(tmp_path: Path, reviews: Path):
    from lowres_ft.pipeline import run
    from tests.conftest import recipe

    folder = tiny.base(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        run(recipe(folder, reviews), tmp_path / "bundle", device_name="cpu")
