"""Bundles: refused by name when anything in them is not what the passport says; verified, predicted and merged."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import pipeline

from lowres_ft import card, device
from lowres_ft.bundle import Bundle, open_bundle
from lowres_ft.errors import BundleError, DataError, ModelError, OutputError
from lowres_ft.linear import LowRankLinear
from lowres_ft.merging import merge
from lowres_ft.pipeline import run
from lowres_ft.prediction import Predictor, evaluate_bundle, examples
from tests import tiny
from tests.conftest import recipe

Bases = Callable[..., Path]
Trainer = Callable[..., Bundle]
CPU = device.find("cpu")
TEXTS = ["the film was good", "dull and long", "a great plot but awful", "fine"]


def rewrite(bundle: Bundle, **changes: object) -> None:
    """Change top-level fields of a passport."""
    path = bundle.folder / "lowres.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_bundle_opens_and_verifies_to_the_bit(trained: Trainer):
    verified = open_bundle(trained().folder).verify(CPU)
    assert (verified.files, verified.probe_rows, verified.exact, verified.largest_difference) == (9, 4, True, 0.0)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path):
    with pytest.raises(BundleError, match="nowhere is not there"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"holds no lowres\.json"):
        open_bundle(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["adapter_model.safetensors", "adapter_config.json", "recipe.yaml", "tokenizer.json", "report.json", "README.md"],
)
def test_a_changed_or_missing_file_is_named(trained: Trainer, name: str):
    bundle = trained()
    path = bundle.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name} is not what lowres.json says"):
        open_bundle(bundle.folder)
    path.unlink()
    with pytest.raises(BundleError, match=f"lacks {name}"):
        open_bundle(bundle.folder)


def test_no_byte_of_any_file_can_change_unseen(trained: Trainer):
    folder, drawn = trained().folder, random.Random(0)
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 10
    for name in names:
        content = (folder / name).read_bytes()
        for _ in range(60 if name == "lowres.json" else 3):
            damaged = bytearray(content)
            damaged[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
            (folder / name).write_bytes(damaged)
            with pytest.raises(BundleError, match=re.escape(str(folder))):
                open_bundle(folder)
        (folder / name).write_bytes(content)
    open_bundle(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ["good", "bad"]}, "labels is"),
        ({"quantize": "int8"}, "quantize is"),
        ({"method": "head"}, "method is"),
        ({"format": 2}, "format"),
        ({"surprise": 1}, "surprise"),
        ({"base": {}}, "base.source"),
    ],
)
def test_a_changed_passport_is_refused(trained: Trainer, changes: dict[str, object], message: str):
    bundle = trained()
    rewrite(bundle, **changes)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle.folder)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_broken_passport_is_refused(trained: Trainer, damage: bytes):
    bundle = trained()
    (bundle.folder / "lowres.json").write_bytes(damage)
    with pytest.raises(BundleError, match=r"lowres\.json"):
        open_bundle(bundle.folder)


def test_another_base_of_the_same_shape_is_refused(trained: Trainer, bases: Bases):
    bundle = trained()
    with pytest.raises(BundleError, match=r"was trained on .* but the base at .* is another one \(weights_sha256"):
        bundle.load(CPU, base=str(bases("bert", seed=9)))
    adapted, _ = bundle.load(CPU, base=str(bases("bert")))
    assert adapted.tensors()


def test_a_base_that_moved_is_told_and_found_with_base(trained: Trainer, reviews: Path, tmp_path: Path):
    folder = tiny.base(tmp_path / "old", "bert")
    bundle = run(recipe(folder, reviews), tmp_path / "moved", device_name="cpu")
    folder.rename(tmp_path / "new")
    with pytest.raises(ModelError, match="no folder") as caught:
        bundle.verify(CPU)
    assert "--base" in caught.value.hint
    assert bundle.verify(CPU, base=str(tmp_path / "new")).exact


def test_tensors_that_do_not_belong_are_refused(trained: Trainer):
    bundle = trained()
    path = bundle.folder / "adapter_model.safetensors"
    tensors = load_file(path)
    head = "base_model.model.classifier.weight"
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != head}, r"classifier.weight \(missing\)"),
        (tensors | {"base_model.model.more": torch.ones(1)}, r"more \(unknown\)"),
        (tensors | {head: torch.ones(3, 32)}, r"has the shape \(3, 32\), expected \(2, 32\)"),
    ):
        save_file(changed, path)
        with pytest.raises(BundleError, match=message):
            bundle.load(CPU)


def test_an_adapter_that_computes_something_else_fails_verification(trained: Trainer):
    bundle = trained()
    path = bundle.folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, path)
    with pytest.raises(BundleError, match="logits of the probe rows differ"):
        bundle.verify(CPU)


def test_a_bundle_without_probe_rows_still_verifies_files_and_base(trained: Trainer):
    bundle = trained("bert", "data.probe_rows=0")
    assert not (bundle.folder / "probe.safetensors").exists()
    assert bundle.verify(CPU).probe_rows == 0


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o007])
def test_files_obey_umask(bases: Bases, reviews: Path, tmp_path: Path, mask: int):
    before = os.umask(mask)
    try:
        bundle = run(recipe(bases(), reviews), tmp_path / "bundle", device_name="cpu")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in bundle.folder.iterdir()} == {0o666 & ~mask}
    assert bundle.folder.stat().st_mode & 0o777 == 0o777 & ~mask


def test_on_another_host_logits_need_to_be_near_only(trained: Trainer):
    bundle = trained()
    path = bundle.folder / "probe.safetensors"
    held = load_file(path)
    for shift, host, passes in ((1e-5, "elsewhere", True), (1e-5, CPU.host, False), (0.1, "elsewhere", False)):
        save_file(held | {"logits": held["logits"] + shift}, path)
        changed = replace(bundle, passport=bundle.passport.model_copy(update={"host": host}))
        if passes:
            assert not changed.verify(CPU).exact
        else:
            with pytest.raises(BundleError, match="differ from those recorded"):
                changed.verify(CPU)


def test_labels_of_any_script_stand_in_the_card(bases: Bases, tmp_path: Path):
    rows = tmp_path / "rows.csv"
    labels = ("\N{THUMBS UP SIGN} \u2028 up", "差劲")
    lines = [f"the film was {('good', 'bad')[n % 2]} {n},{labels[n % 2]}" for n in range(30)]
    rows.write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    bundle = run(recipe(bases(), rows, "task.labels=null"), tmp_path / "bundle", device_name="cpu")
    card = (bundle.folder / "README.md").read_text(encoding="utf-8")
    assert f'0: "差劲", 1: "{labels[0]}"' in card


def test_the_card_tells_the_models_config_all_that_the_task_does():
    task = SimpleNamespace(model_config_fields=lambda: {"num_labels": 1, "problem_type": "regression", "label2id": {}})
    assert card._fields(task) == ',\n    num_labels=1,\n    problem_type="regression",\n    label2id={}'
    assert card._literal({0: 'a"\n', "b": None}) == r'{0: "a\"\n", "b": None}'


def test_a_bundle_that_moved_still_works(trained: Trainer, tmp_path: Path):
    shutil.move(trained().folder, tmp_path / "mail")
    assert open_bundle(tmp_path / "mail").verify(CPU).exact


def test_predictions_follow_the_order_of_the_texts_and_have_probabilities(trained: Trainer):
    predictor = Predictor(*trained("bert", "train.steps=20").load(CPU))
    together = list(predictor.texts(TEXTS))
    assert [found["text"] for found in together] == TEXTS
    for text, found in zip(TEXTS, together, strict=True):
        (alone,) = predictor.texts([text])
        assert set(found) == {"text", "label", "scores"}
        assert sum(found["scores"].values()) == pytest.approx(1.0)
        assert found["label"] == max(found["scores"], key=found["scores"].get)
        assert alone["scores"] == pytest.approx(found["scores"], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "review,other\nthe film was good,1\ndull,2\n"),
        ("a.jsonl", '{"review": "the film was good"}\n{"review": "dull"}\n'),
        ("a.txt", "the film was good\n\ndull\n"),
    ],
)
def test_files_to_predict_need_no_labels(bases: Bases, reviews: Path, tmp_path: Path, name: str, content: str):
    renamed = tmp_path / "renamed.csv"
    renamed.write_text(reviews.read_text().replace("text,label", "review,label", 1))
    bundle = run(recipe(bases(), renamed, "data.columns.text=review"), tmp_path / "bundle", device_name="cpu")
    (tmp_path / name).write_text(content)
    assert [example.text for example in examples(bundle, str(tmp_path / name))] == ["the film was good", "dull"]
    with pytest.raises(DataError, match="no file"):
        list(examples(bundle, str(tmp_path / "none.txt")))


def test_rows_that_changed_since_training_are_not_scored(bases: Bases, reviews: Path, tmp_path: Path):
    rows = tmp_path / "data.csv"
    shutil.copy(reviews, rows)
    bundle = run(recipe(bases(), rows), tmp_path / "bundle", device_name="cpu")
    with rows.open("a") as file:
        file.write("a new text,good\n")
    with pytest.raises(DataError, match="have changed since training"):
        evaluate_bundle(bundle, *bundle.load(CPU), tmp_path)
    assert "have changed since training" in merge(bundle, tmp_path / "merged", CPU).source


def test_outputs_that_are_not_numbers_are_no_predictions(trained: Trainer):
    adapted, plan = trained().load(CPU)
    with torch.no_grad():
        adapted.trained()["classifier.bias"].fill_(float("nan"))
    with pytest.raises(ModelError, match="not a finite number, first for text 1"):
        list(Predictor(adapted, plan).texts(TEXTS))


def test_evaluation_repeats_what_was_measured(trained: Trainer, tmp_path: Path, reviews: Path):
    bundle = trained("bert", "train.steps=10")
    report = json.loads((bundle.folder / "report.json").read_text())
    adapted, plan = bundle.load(CPU)
    scores = evaluate_bundle(bundle, adapted, plan, tmp_path)
    assert json.loads(json.dumps(scores.to_json())) == report["scores"]["test"]
    other = evaluate_bundle(bundle, adapted, plan, tmp_path, str(reviews))
    assert other.metrics["accuracy"].count == 60
    assert 0 <= other.metrics["accuracy"].value <= 1


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "qwen3", "distilbert", "albert"])
def test_a_merged_model_gives_the_same_labels_in_a_pipeline(trained: Trainer, tmp_path: Path, architecture: str):
    bundle = trained(architecture, "train.steps=10", "model.quantize=none")
    found = merge(bundle, tmp_path / "merged", CPU)
    assert found.largest_difference < 1e-4
    assert found.flipped == 0
    assert found.from_measured is None
    assert found.metric is not None
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    classify = pipeline("text-classification", model=str(tmp_path / "merged"), device="cpu")
    ours = list(Predictor(*bundle.load(CPU), calibrated=False).texts(TEXTS))
    for theirs, own in zip(classify(TEXTS), ours, strict=True):
        assert theirs["label"] == own["label"]
        assert theirs["score"] == pytest.approx(own["scores"][own["label"]], abs=1e-4)


def test_a_merge_of_a_quantized_run_tells_how_far_it_lies_from_what_was_measured(trained: Trainer, tmp_path: Path):
    bundle = trained("bert", "train.steps=10", "model.quantize=int8")
    found = merge(bundle, tmp_path / "merged", CPU)
    assert found.largest_difference < 1e-4
    assert found.from_measured is not None
    assert 0 < found.from_measured < 0.5


def test_a_merge_that_changes_answers_leaves_nothing(trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bundle = trained("bert", "train.steps=10")
    honest = LowRankLinear.delta
    monkeypatch.setattr(LowRankLinear, "delta", lambda layer: honest(layer) * 1.5)
    with pytest.raises(BundleError, match="the merged model differs from adapter and base"):
        merge(bundle, tmp_path / "merged", CPU)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("merged")]


def test_a_merge_without_the_data_compares_the_probe_rows_and_says_so(bases: Bases, reviews: Path, tmp_path: Path):
    moved = tmp_path / "data.csv"
    shutil.copy(reviews, moved)
    bundle = run(recipe(bases(), moved), tmp_path / "bundle", device_name="cpu")
    moved.unlink()
    found = merge(bundle, tmp_path / "merged", CPU)
    assert found.rows == 4
    assert "data.csv" in found.source
    assert found.metric is None
    assert merge(bundle, tmp_path / "again", CPU, rows=str(reviews)).rows == 60


def test_a_place_that_is_taken_and_a_whole_model_cannot_be_merged(trained: Trainer, tmp_path: Path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="taken exists"):
        merge(trained(), tmp_path / "taken", CPU)
    with pytest.raises(BundleError, match="nothing to merge"):
        merge(trained("bert", "method.kind=full", out="full"), tmp_path / "merged", CPU)


def test_a_full_bundle_is_a_plain_transformers_folder_with_a_passport(trained: Trainer):
    bundle = trained("bert", "method.kind=full", "train.learning_rate=0.001")
    names = {path.name for path in bundle.folder.iterdir()}
    assert {"config.json", "model.safetensors", "lowres.json"} < names
    assert "adapter_config.json" not in names
    assert open_bundle(bundle.folder).verify(CPU).exact


def test_dtype_and_storage_can_be_chosen(trained: Trainer):
    bundle = trained("bert", "model.quantize=int8")
    found = {}
    plain = {"dtype": "float32", "quantize": "none"}
    for name, options in {"trained": {}, "float32": plain, "bf16": {"dtype": "bfloat16"}}.items():
        adapted, plan = bundle.load(CPU, **options)
        found[name] = np.array([list(p["scores"].values()) for p in Predictor(adapted, plan).texts(TEXTS)])
    assert 0 < np.abs(found["trained"] - found["float32"]).max() < 0.1
    assert 0 < np.abs(found["trained"] - found["bf16"]).max() < 0.1
