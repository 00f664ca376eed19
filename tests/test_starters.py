"""The main job on real data: the shipped recipes with the starter assets, fetched as users fetch them."""

import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowres_ft import bases, contrast, device
from lowres_ft.assets import STARTERS, fetch
from lowres_ft.bundle import Bundle, open_bundle
from lowres_ft.files import sha256
from lowres_ft.merging import merge
from lowres_ft.parts import ModelSpec
from lowres_ft.pipeline import run
from lowres_ft.prediction import Predictor
from lowres_ft.readers import rows
from lowres_ft.recipe import load_recipe, shipped
from tests.conftest import users_cache

pytestmark = pytest.mark.assets
SMOLLM_WEIGHTS = "9e7a06a51fdacdc59d5796a7cab5060d1df61ce32003f4115eb261ae330a7381"
"""What the conversion makes on every machine: each value is one product and one sum in fp32."""
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
    with users_cache():
        return run(wanted, tmp_path_factory.mktemp("starters") / "sentiment", device_name="cpu")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    with users_cache():
        return [row["text"] for _, row in itertools.islice(rows("starter:rotten-tomatoes"), 200)]


@pytest.mark.parametrize("name", STARTERS)
def test_every_starter_is_what_its_entry_says(name: str):
    asset = STARTERS[name].asset
    folder = fetch(asset)
    for member, digest in asset.members.items():
        if member.endswith(".gguf"):
            origin = json.loads((folder / "origin.json").read_text())
            assert (origin["file"], origin["sha256"]) == (asset.below(member), digest)
        else:
            assert asset.digest(folder, member) == digest


@pytest.mark.parametrize(("name", "expected"), [("rotten-tomatoes", 8530), ("imdb", 25000)])
def test_data_starters_hold_their_rows(name: str, expected: int):
    labels = [row["label"] for _, row in rows(f"starter:{name}")]
    assert len(labels) == expected
    assert labels.count("0") == labels.count("1") == expected // 2


R8 = {"earn": 2840, "acq": 1596, "crude": 253, "trade": 251, "money-fx": 206, "interest": 190, "ship": 108, "grain": 41}
R8_TEST = {"earn": 1083, "acq": 696, "crude": 121, "money-fx": 87, "interest": 81, "trade": 75, "ship": 36, "grain": 10}


def test_topics_come_in_their_usual_splits():
    train, test = ([row for _, row in rows(f"starter:reuters-r8/{split}")] for split in ("train", "test"))
    assert [row for _, row in rows("starter:reuters-r8")] == train
    assert Counter(row["label"] for row in train) == R8
    assert Counter(row["label"] for row in test) == R8_TEST
    assert len({row["text"] for row in train} & {row["text"] for row in test}) == 4
    for split, expected in (("train", 11293), ("test", 7528)):
        labels = Counter(row["label"] for _, row in rows(f"starter:newsgroups-20/{split}"))
        assert (labels.total(), len(labels)) == (expected, 20)
        assert min(labels.values()) > 250


def test_tweets_have_ten_types_of_entities():
    found = [row for _, row in rows("starter:wnut16")]
    assert (len(found), sum(len(row["words"]) for row in found)) == (2394, 46469)
    tags = Counter(tag for row in found for tag in row["tags"])
    assert len({tag[2:] for tag in tags if tag != "O"}) == 10
    assert sum(count for tag, count in tags.items() if tag.startswith("B-")) == 1496
    assert (tags["B-person"], tags["B-tvshow"]) == (449, 34)


def test_dialogs_come_in_28_languages():
    english = [row for _, row in rows("starter:dialogs")]
    said = [[message["content"] for message in row["messages"]] for row in english]
    assert len(english) == 2025
    assert sum(len(texts) for texts in said) == 2 * 2144
    assert (len({texts[0] for texts in said}), len({texts[1] for texts in said})) == (748, 870)
    assert len({row["topic"] for row in english}) == 21
    counts = {language: len(list(rows(f"starter:dialogs/{language}"))) for language in STARTERS["dialogs"].splits}
    assert len(counts) == 28
    assert (counts["english"], counts["german"], counts["ukrainian"], counts["thai"]) == (2025, 113, 456, 6)


def test_smollm2_answers_and_is_known_by_its_gguf():
    base = bases.resolve(ModelSpec(base="starter:smollm2-135m"))
    assert base.name == str(base.folder)
    assert sha256(base.folder / "model.safetensors") == SMOLLM_WEIGHTS
    assert base.identity()["weights_sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    config = base.config()
    assert (config["rope_theta"], config["max_position_embeddings"]) == (100000, 8192)
    assert config["tie_word_embeddings"]
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    model = AutoModelForCausalLM.from_pretrained(base.folder)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**asked, max_new_tokens=24, do_sample=False)[0][asked["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_smollm2_has_the_tokenizer_that_it_was_trained_with():
    tokenizer = AutoTokenizer.from_pretrained(bases.resolve(ModelSpec(base="starter:smollm2-135m")).folder)
    assert len(tokenizer) == 49152
    split = {
        "In 2026": ["In", "Ġ", "2", "0", "2", "6"],
        "a  12": ["a", "ĠĠ", "1", "2"],
        "Hello world": ["Hello", "Ġworld"],
        "<|im_start|>user\n": ["<|im_start|>", "user", "Ċ"],
    }
    assert {text: tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) for text in split} == split
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )


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
    predictor = Predictor(*bundle.load(device.find("cpu"), dtype="float32", quantize="none"), calibrated=False)
    ours = np.array([list(found["scores"].values()) for found in predictor.texts(texts)])
    assert np.abs(ours - theirs).max() <= 1e-3
    assert (ours.argmax(1) == theirs.argmax(1)).all()


def test_it_merges_and_verifies(bundle: Bundle, tmp_path: Path):
    assert open_bundle(bundle.folder).verify(device.find("cpu")).exact
    assert merge(bundle, tmp_path / "merged", device.find("cpu")).rows == 852


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_recipe_runs_for_two_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Few rows, also of unrelated text, but of every class; one short sample, as writing takes long; short texts, as
    # those of test are many.
    monkeypatch.setattr(contrast, "_CONTROL_ROWS", 8)
    more = {"topics-lora-int8": ["data.limit=2500", "task.max_length=32"], "entities-lora": ["data.limit=1200"]}
    held = ["data.validation=0.01", "data.test=0.01"]
    short = ["data.limit=64", "task.samples=1", "task.max_new_tokens=8", "train.batch_size=4", *held]
    more |= dict.fromkeys(("chat-lora-int8", "chat-qlora"), short)
    few = more.get(name, ["data.limit=64"])
    wanted = load_recipe(name, ["train.steps=2", "train.batch_size=8", *few])
    found = run(wanted, tmp_path / "bundle", device_name="cpu")
    assert open_bundle(found.folder).recipe.name == name
