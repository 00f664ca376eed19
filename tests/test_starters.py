"""The main job on real data: the shipped recipes with the starter assets, fetched as users fetch them."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lowres_ft import bases, device
from lowres_ft.assets import STARTERS, fetch
from lowres_ft.bundle import Bundle, open_bundle
from lowres_ft.merging import merge
from lowres_ft.pipeline import run
from lowres_ft.prediction import Predictor
from lowres_ft.readers import rows
from lowres_ft.recipe import load_recipe, shipped

pytestmark = pytest.mark.assets
CLIENT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
base, bundle, file = sys.argv[1:]
texts = json.load(open(file))
tokenizer = AutoTokenizer.from_pretrained(bundle)
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
model = PeftModel.from_pretrained(model, bundle).eval()
with torch.inference_mode():
    inputs = tokenizer(texts, truncation=True, max_length=128, padding=True, return_tensors="pt")
    print(json.dumps(model(**inputs).logits.softmax(-1).tolist()))
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """`sentiment-lora`, cut short."""
    wanted = load_recipe("sentiment-lora", ["train.steps=60"])
    return run(wanted, tmp_path_factory.mktemp("starters") / "sentiment", device_name="cpu")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [row["text"] for _, row in itertools.islice(rows("starter:rotten-tomatoes"), 200)]


def test_every_starter_is_what_its_entry_says():
    assert set(STARTERS) >= {"minilm-l6", "rotten-tomatoes", "imdb"}
    for starter in STARTERS.values():
        folder = fetch(starter.asset)
        for member, digest in starter.asset.members.items():
            assert starter.asset.digest(folder, member) == digest


@pytest.mark.parametrize(("name", "expected"), [("rotten-tomatoes", 8530), ("imdb", 25000)])
def test_data_starters_hold_their_rows(name: str, expected: int):
    labels = [row["label"] for _, row in rows(f"starter:{name}")]
    assert len(labels) == expected
    assert labels.count("0") == labels.count("1") == expected // 2


def test_a_short_run_learns_and_names_its_base_as_the_hub_does(bundle: Bundle):
    report = json.loads((bundle.folder / "report.json").read_text())
    assert report["scores"]["test"]["accuracy"]["value"] > 0.7
    assert 0.7 < report["baselines"]["tfidf"]["accuracy"]["value"] < 0.8
    config = json.loads((bundle.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert config["revision"] == "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"


def test_a_client_with_peft_alone_gives_the_same_labels(bundle: Bundle, texts: list[str], tmp_path: Path):
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    base = bases.resolve(bundle.recipe.model).folder
    command = [sys.executable, "-c", CLIENT, str(base), str(bundle.folder), str(tmp_path / "texts.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    theirs = np.array(json.loads(done.stdout.splitlines()[-1]))
    predictor = Predictor(*bundle.load(device.find("cpu"), dtype="float32", quantize="none"))
    ours = np.array([list(found["scores"].values()) for found in predictor.texts(texts)])
    assert np.abs(ours - theirs).max() <= 1e-3
    assert (ours.argmax(1) == theirs.argmax(1)).all()


def test_it_merges_and_verifies(bundle: Bundle, tmp_path: Path):
    assert open_bundle(bundle.folder).verify(device.find("cpu")).exact
    assert merge(bundle, tmp_path / "merged", device.find("cpu")).rows == 852


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_recipe_runs_for_two_steps(name: str, tmp_path: Path):
    wanted = load_recipe(name, ["train.steps=2", "data.limit=64", "train.batch_size=8"])
    found = run(wanted, tmp_path / "bundle", device_name="cpu")
    assert open_bundle(found.folder).recipe.name == name
