"""What must not work, and how it is told: a row for each bad input, as a user or an attacker would bring it.

Every row is one error with a sentence of its own, exit code 2, no traceback and no control sequence; every file that
was there is there as it was, nothing was written, and no code ran.
"""

import gzip
import hashlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from lowres_ft.pipeline import run
from tests import tiny
from tests.conftest import Command, recipe

Damage = Callable[[Path], object]
ROWS = "".join(f"the film number{n} was {'good' if n % 2 else 'bad'},{'good' if n % 2 else 'bad'}\n" for n in range(40))
CSV = "text,label\n" + ROWS
TRAIN = "recipe mine.yaml -q --device cpu --out out data.train={file}"
NER = TRAIN + " task.kind=ner"
SHOW = "show bad.yaml"
HEAD = (
    "name: bad\ntask: {kind: classification}\nmodel: {base: base}\nmethod: {kind: lora}\ndata: {train: reviews.csv}\n"
)
RUN = "recipe mine.yaml -q --device cpu --out out"
VERIFY = "verify bundle -q --device cpu"


class Canary:
    """What a pickle would run."""

    def __reduce__(self):
        return os.system, ("touch executed",)


@dataclass(frozen=True)
class Bad:
    """A bad input, the command that meets it, and what is told."""

    name: str
    command: str
    told: str
    content: str | bytes | None = None
    """Of the file that `{file}` in the command stands for: `bad.csv`, or what `file` says."""
    file: str = "bad.csv"
    damage: Damage = field(default=lambda _: None)
    """What is done in the folder of `base`, `bundle`, `reviews.csv` and `mine.yaml` before."""


# Damage


def edit(name: str, **changes: object) -> Damage:
    """Set keys of a JSON file; None takes them out."""

    def change(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_bytes()) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def write(name: str, content: bytes | str) -> Damage:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def replace(name: str, old: str, new: str) -> Damage:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


def remove(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def flip(name: str, at: int = 100) -> Damage:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 1
        (folder / name).write_bytes(content)

    return change


def cut(name: str, size: int) -> Damage:
    return lambda folder: os.truncate(folder / name, size)


def header(name: str, change: Callable[[dict], object]) -> Damage:
    """Change the header of a safetensors file."""

    def write_header(folder: Path) -> None:
        data = (folder / name).read_bytes()
        size = int.from_bytes(data[:8], "little")
        content = json.loads(data[8 : 8 + size])
        change(content)
        text = json.dumps(content).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return write_header


def tensors(name: str, change: Callable[[dict], object]) -> Damage:
    def rewrite(folder: Path) -> None:
        held = load_file(folder / name)
        change(held)
        save_file(held, folder / name, metadata={"format": "pt"})

    return rewrite


def sealed(*damages: Damage, forget: tuple[str, ...] = ()) -> Damage:
    """What an attacker does: the passport's hashes are made to fit the damage."""

    def change(folder: Path) -> None:
        both(*damages)(folder)
        path = folder / "bundle" / "lowres.json"
        passport = json.loads(path.read_bytes())
        passport.pop("digest")
        for name in [*passport["files"]]:
            file = folder / "bundle" / name
            if name in forget:
                del passport["files"][name]
            elif file.is_file():
                content = file.read_bytes()
                passport["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        path.write_text(json.dumps(passport))

    return change


def link(name: str, target: str) -> Damage:
    """Move a file out of its folder and put a link in its place."""

    def change(folder: Path) -> None:
        (folder / "elsewhere").mkdir(exist_ok=True)
        if (folder / name).exists():
            shutil.move(folder / name, folder / "elsewhere" / target)
        (folder / name).symlink_to(folder / "elsewhere" / target)

    return change


def files_table(name: str, record: object) -> Damage:
    def change(folder: Path) -> None:
        path = folder / "bundle" / "lowres.json"
        passport = json.loads(path.read_bytes())
        passport.pop("digest")
        passport["files"][name] = record
        path.write_text(json.dumps(passport))

    return change


def other_base(folder: Path) -> None:
    """Put a base of the same shapes in the place of the bundle's."""
    tiny.base(folder / "base", seed=1)


def without_head(held: dict[str, torch.Tensor]) -> None:
    for name in [name for name in held if "classifier" in name]:
        del held[name]


def nan(held: dict[str, torch.Tensor]) -> None:
    for tensor in held.values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))


def first(change: Callable[[dict], object]) -> Callable[[dict], object]:
    return lambda content: change(next(entry for name, entry in content.items() if name != "__metadata__"))


def overlap(content: dict) -> None:
    a, b = [entry for name, entry in content.items() if name != "__metadata__"][:2]
    a["data_offsets"] = b["data_offsets"]


def table(*rows: dict) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue().to_pybytes()


INDEX = "base/model.safetensors.index.json"
RECORD = {"sha256": "0" * 64, "size": 1}
PICKLE = pickle.dumps(Canary())
UNKNOWN_TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}
HEADLESS = sealed(tensors("bundle/adapter_model.safetensors", without_head))

DATA = [
    Bad("no such file", TRAIN.format(file="reviwes.csv"), "did you mean 'reviews.csv'?"),
    Bad("folder for a file", TRAIN.format(file="base"), "base is a folder"),
    Bad("unknown ending", TRAIN, "unknown kind of file", CSV, "bad.xls"),
    Bad("packed file", TRAIN, "unknown kind of file", gzip.compress(CSV.encode()), "bad.csv.gz"),
    Bad("packed file called csv", TRAIN, "bad.csv: the file is packed (gzip)", gzip.compress(CSV.encode())),
    Bad("empty file", TRAIN, "bad.csv is empty", ""),
    Bad("header alone", TRAIN, "bad.csv holds no rows", "text,label\n"),
    Bad("typo in a column", TRAIN, "'text'", CSV.replace("text", "txet", 1)),
    Bad("semicolons", TRAIN, "separated by semicolons", CSV.replace(",", ";")),
    Bad("UTF-16", TRAIN, "UTF-16, not UTF-8", CSV.encode("utf-16")),
    Bad("Latin-1", TRAIN, "0xe9, is not UTF-8", CSV.replace("film", "caf\xe9", 1).encode("latin-1")),
    Bad("NUL bytes", TRAIN, "is NUL, which no text holds", CSV.replace("film", "fi\0lm", 1)),
    Bad("quote never closed", TRAIN, "never closed", 'text,label\n"the film,good\n' + ROWS),
    Bad("text after a quote", TRAIN, "text follows the closing quote", 'text,label\n"the"film,good\n'),
    Bad("huge field", TRAIN, "a field of more than", f'text,label\n"{"x" * (1 << 24)} ",good\n'),
    Bad("lone CR", TRAIN, "bad.csv:1: ", CSV.replace("\n", "\r")),
    Bad("column twice", TRAIN, "two columns are called 'text'", "text,text,label\na,b,good\n"),
    Bad("row longer than the header", TRAIN, "bad.csv:2: 3 fields, but the header has 2", "text,label\na,b,c\n"),
    Bad("row shorter than the header", TRAIN, "bad.csv:2: 1 field, but the header has 2", "text,label\na\n"),
    Bad("empty text", TRAIN, "bad.csv:2: the text is empty", "text,label\n ,good\n" + ROWS),
    Bad("one class", TRAIN + " task.labels=null", "label", "text,label\na,good\nb,good\n" * 9),
    Bad("label nearly right", TRAIN, "did you mean 'good'?", CSV + "so it was,godo\n"),
    Bad("labels but for capitals", TRAIN + " task.labels=null", "only in how it is written", CSV + "so it was,Good\n"),
    Bad("label of a whole page", TRAIN, "...", CSV + f"so it was,{'page ' * 10_000}\n"),
    Bad("too few rows", TRAIN, "row", "text,label\na,good\nb,bad\n"),
    Bad("formula for a label", TRAIN, "=cmd|", CSV + "so it was,=cmd|'/C calc'!A0\n"),
    Bad("escapes in a label", TRAIN, "\\x1b[2J", CSV + "so it was,\x1b[2Jgood\n"),
    Bad("escapes in a column", TRAIN, "\\u001b[2J", "\x1b[2Jtext,label\na,b,c\n"),
    Bad("direction turned in a column", TRAIN, "\\u202e", "\u202etext,label\na,b,c\n"),
    Bad("JSONL of arrays", TRAIN, "bad.jsonl:1: a list, not an object", '["a", "good"]\n', "bad.jsonl"),
    Bad(
        "JSONL line broken", TRAIN, "bad.jsonl:2: not JSON", '{"text": "a", "label": "good"}\n{"text": \n', "bad.jsonl"
    ),
    Bad("JSONL nested", TRAIN, "bad.jsonl:1: cannot be read", '{"text": ' + "[" * 100_000, "bad.jsonl"),
    Bad("JSONL number", TRAIN, "bad.jsonl:1: cannot be read", '{"text": ' + "9" * 5000 + "}", "bad.jsonl"),
    Bad("JSONL half a character", TRAIN, "half a character", '{"text": "\\ud800", "label": "good"}\n', "bad.jsonl"),
    Bad("JSONL text is a list", TRAIN, "bad.jsonl:1", '{"text": ["a"], "label": "good"}\n', "bad.jsonl"),
    Bad("JSON of one object", TRAIN, "holds one object, not an array", '{"text": "a"}', "bad.json"),
    Bad("JSON nested", TRAIN, "bad.json: cannot be read", "[" * 100_000, "bad.json"),
    Bad("Parquet nested", TRAIN, "row 1", table({"text": {"a": [1]}, "label": "good"}), "bad.parquet"),
    Bad("Parquet cut", TRAIN, "not a Parquet file", table({"text": "a", "label": "good"})[:-9], "bad.parquet"),
    Bad("CoNLL of unequal columns", NER, "bad.conll:2: 3 columns", "Ann B-PER\nmoved VB O\nso O\n", "bad.conll"),
    Bad("CoNLL without tags", NER, "bad.conll", "Ann\nmoved\n", "bad.conll"),
    Bad("CoNLL with a strange tag", NER, "bad.conll", "Ann B-PER\nmoved X-Y-\n\n", "bad.conll"),
    Bad("entity beyond its text", NER, "bad.jsonl:1", '{"text": "Ann", "entities": [[0, 9, "PER"]]}\n', "bad.jsonl"),
    Bad("rows to predict on are empty", "predict bundle --file {file} -q", "no text to predict on", "", "bad.txt"),
    Bad(
        "lines to predict on are blank", "predict bundle --file {file} -q", "no text to predict on", "\n \n", "bad.txt"
    ),
    Bad("nothing typed", "predict bundle - -q", "no text to predict on"),
]

RECIPE = [
    Bad("typo in a key", SHOW, "did you mean 'batch_size'?", HEAD + "train: {batchsize: 8}\n", "bad.yaml"),
    Bad("typo in a part", SHOW, "did you mean 'train'?", HEAD + "trian: {epochs: 1}\n", "bad.yaml"),
    Bad(
        "text for a number", SHOW, "must be a whole number, found 'many'", HEAD + "train: {epochs: many}\n", "bad.yaml"
    ),
    Bad("key twice", SHOW, "bad.yaml:6: the key 'name' stands here twice", HEAD + "name: again\n", "bad.yaml"),
    Bad("tab for spaces", SHOW, "bad.yaml:7: ", HEAD + "train:\n\tepochs: 1\n", "bad.yaml"),
    Bad("aliases that multiply", SHOW, "are not read", "a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "bad.yaml"),
    Bad("nested lists", SHOW, "nested too deeply", HEAD + "notes: " + "[" * 50 + "]" * 50, "bad.yaml"),
    Bad("nested lists without end", SHOW, "nested too deeply", "[" * 100_000, "bad.yaml"),
    Bad("huge recipe", SHOW, "is larger than 1.0 MiB", HEAD + "#" * (1 << 20), "bad.yaml"),
    Bad("tag of Python", SHOW, "are not read", "name: !!python/object/apply:os.system [touch executed]\n", "bad.yaml"),
    Bad("not a number", SHOW, "must be", HEAD + "train: {learning_rate: .nan}\n", "bad.yaml"),
    Bad("infinite", SHOW, "must be", HEAD + "train: {learning_rate: .inf}\n", "bad.yaml"),
    Bad("number of 5,000 digits", SHOW, "5000 digits", HEAD + f"train: {{epochs: {'9' * 5000}}}\n", "bad.yaml"),
    Bad("not UTF-8", SHOW, "not UTF-8", HEAD.encode() + b"summary: \xff\n", "bad.yaml"),
    Bad("list for a recipe", SHOW, "a recipe is a mapping", "- a\n- b\n", "bad.yaml"),
    Bad("escapes in a key", SHOW, "\\u001b[2J", HEAD + '"\\e[2J": 1\n', "bad.yaml"),
    Bad("name that leaves the folder", SHOW, "name: must begin with", HEAD.replace("bad", "../bad", 1), "bad.yaml"),
    Bad("rank below one", "show sentiment-lora method.rank=-1", "method.rank: must be at least 1, found -1"),
    Bad("scale that overflows", "show sentiment-lora method.alpha=1e308", "method.alpha: must be at most 1e+06"),
    Bad("unknown method", "show sentiment-lora method.kind=lra", "did you mean 'lora'?"),
    Bad("method of a path", "show sentiment-lora method.kind=../../x", "method.kind"),
    Bad("unknown override", "show sentiment-lora train.epoch=3", "did you mean 'epochs'?"),
    Bad("override without a value", "show sentiment-lora train.epochs", "is not KEY=VALUE"),
    Bad("unknown recipe", "show sentimnet-lora", "did you mean 'sentiment-lora'?"),
    Bad("escapes in an argument", "show \x1b]0;title\x07", "\\u001b]0;title\\u0007"),
    Bad("share of everything", "show sentiment-lora data.validation=1.5", "data.validation"),
    Bad("budget without a unit", "show sentiment-lora budget.memory=4", "budget.memory"),
]

MODEL = [
    Bad(
        "pickled weights",
        RUN,
        "only pytorch_model.bin",
        damage=both(remove("base/model.safetensors"), write("base/pytorch_model.bin", PICKLE)),
    ),
    Bad(
        "pickled weights .pt",
        RUN,
        "only weights.pt",
        damage=both(remove("base/model.safetensors"), write("base/weights.pt", PICKLE)),
    ),
    Bad(
        "pickled weights .pkl",
        RUN,
        "only weights.pkl",
        damage=both(remove("base/model.safetensors"), write("base/weights.pkl", PICKLE)),
    ),
    Bad("pickled weights in a file", RUN + " model.base={file}", "is a file", PICKLE, "weights.bin"),
    Bad("pickle called safetensors", RUN, "cannot be loaded", damage=write("base/model.safetensors", PICKLE)),
    Bad("no config", RUN, "holds no config.json", damage=remove("base/config.json")),
    Bad("config is no JSON", RUN, "config.json: cannot be read", damage=write("base/config.json", "{")),
    Bad("config nested", RUN, "config.json: cannot be read", damage=write("base/config.json", '{"a":' * 100_000)),
    Bad(
        "config with its own code",
        RUN,
        "auto_map",
        damage=both(
            edit("base/config.json", auto_map={"AutoConfig": "evil.C"}), write("base/evil.py", "open('executed', 'w')")
        ),
    ),
    Bad(
        "tokenizer with its own code",
        RUN,
        "auto_map",
        damage=both(
            edit("base/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}),
            write("base/evil.py", "open('executed', 'w')"),
        ),
    ),
    Bad("unknown architecture", RUN, "cannot read its config", damage=edit("base/config.json", model_type="bret")),
    Bad(
        "another architecture", RUN, "so they are not this model's", damage=edit("base/config.json", model_type="gpt2")
    ),
    Bad("layers without number", RUN, "which no model has", damage=edit("base/config.json", num_hidden_layers=10**9)),
    Bad("width without measure", RUN, "cannot be used", damage=edit("base/config.json", hidden_size=2**62)),
    Bad("width of another model", RUN, "not this model's", damage=edit("base/config.json", hidden_size=64)),
    Bad("no tokenizer", RUN, "holds no tokenizer", damage=remove("base/tokenizer.json")),
    Bad("tokenizer broken", RUN, "no tokenizer can be loaded", damage=write("base/tokenizer.json", '{"model": 3}')),
    Bad(
        "tokenizer that panics",
        RUN,
        "no tokenizer can be loaded",
        damage=edit("base/tokenizer.json", post_processor=UNKNOWN_TEMPLATE),
    ),
    Bad("weights cut", RUN, "cannot be loaded", damage=cut("base/model.safetensors", 5000)),
    Bad("weights empty", RUN, "cannot be loaded", damage=write("base/model.safetensors", b"")),
    Bad("header longer than the file", RUN, "cannot be loaded", damage=flip("base/model.safetensors", 6)),
    Bad("offsets overlap", RUN, "cannot be loaded", damage=header("base/model.safetensors", overlap)),
    Bad(
        "unknown dtype",
        RUN,
        "cannot be loaded",
        damage=header("base/model.safetensors", first(lambda entry: entry.update(dtype="F99"))),
    ),
    Bad(
        "shape larger than its bytes",
        RUN,
        "cannot be loaded",
        damage=header("base/model.safetensors", first(lambda entry: entry.update(shape=[2**40, 2**20]))),
    ),
    Bad(
        "weights that are no numbers", RUN, "base's weights are at fault", damage=tensors("base/model.safetensors", nan)
    ),
    Bad(
        "shards outside",
        RUN,
        "'../reviews.csv', which is not a file of that folder",
        damage=both(
            remove("base/model.safetensors"), write(INDEX, json.dumps({"weight_map": {"a": "../reviews.csv"}}))
        ),
    ),
    Bad(
        "shards of an absolute path",
        RUN,
        "which is not a file of that folder",
        damage=both(remove("base/model.safetensors"), write(INDEX, json.dumps({"weight_map": {"a": "/etc/passwd"}}))),
    ),
    Bad(
        "index broken", RUN, "is no index of weights", damage=both(remove("base/model.safetensors"), write(INDEX, "[]"))
    ),
    Bad("weights linked outside", RUN, "a link to", damage=link("base/model.safetensors", "m.safetensors")),
    Bad("config linked outside", RUN, "a link to", damage=link("base/config.json", "c.json")),
    Bad("adapter for a base", RUN + " model.base=bundle", "holds no config.json"),
]

BUNDLE = [
    Bad("no bundle", "verify base -q", "holds no lowres.json"),
    Bad("packed bundle", "verify {file} -q", "unpack it first", b"PK\3\4", "bundle.zip"),
    Bad("byte changed, verify", VERIFY, "it was changed", damage=flip("bundle/adapter_model.safetensors")),
    Bad(
        "byte changed, predict",
        "predict bundle x -q",
        "it was changed",
        damage=flip("bundle/adapter_model.safetensors"),
    ),
    Bad("byte changed, merge", "merge bundle out -q", "it was changed", damage=flip("bundle/recipe.yaml", 3)),
    Bad("byte changed, evaluate", "evaluate bundle -q", "it was changed", damage=flip("bundle/tokenizer.json", 50)),
    Bad(
        "labels renamed",
        "predict bundle x -q",
        "labels is ('good', 'bad')",
        damage=edit("bundle/lowres.json", labels=["good", "bad"]),
    ),
    Bad(
        "labels renamed in the recipe",
        VERIFY,
        "labels is ('bad', 'good')",
        damage=sealed(replace("bundle/recipe.yaml", "- bad\n    - good", "- good\n    - bad")),
    ),
    Bad("another base, verify", VERIFY, "the base at", damage=other_base),
    Bad(
        "another base, predict",
        "predict bundle x -q",
        "is another one",
        damage=other_base,
    ),
    Bad(
        "another base, merge",
        "merge bundle out -q",
        "is another one",
        damage=other_base,
    ),
    Bad(
        "another base, evaluate",
        "evaluate bundle -q",
        "is another one",
        damage=other_base,
    ),
    Bad("another tokenizer", VERIFY, "tokenizer_sha256", damage=flip("base/tokenizer.json", 40)),
    Bad("tokenizer missing", VERIFY, "lacks tokenizer.json", damage=remove("bundle/tokenizer.json")),
    Bad(
        "head missing",
        VERIFY,
        "do not belong to this model",
        damage=HEADLESS,
    ),
    Bad(
        "head missing, predict",
        "predict bundle x -q",
        "do not belong to this model",
        damage=HEADLESS,
    ),
    Bad(
        "adapter of another",
        VERIFY,
        "the logits of the probe rows differ",
        damage=sealed(
            tensors("bundle/adapter_model.safetensors", lambda held: [tensor.add_(0.5) for tensor in held.values()])
        ),
    ),
    Bad("adapter of no numbers", VERIFY, "", damage=sealed(tensors("bundle/adapter_model.safetensors", nan))),
    Bad(
        "adapter of another rank",
        VERIFY,
        "has the shape",
        damage=sealed(
            tensors(
                "bundle/adapter_model.safetensors",
                lambda held: held.update({n: t[:2].clone() for n, t in held.items() if "lora_A" in n}),
            )
        ),
    ),
    Bad("adapter pickled", VERIFY, "cannot be read", damage=sealed(write("bundle/adapter_model.safetensors", PICKLE))),
    Bad(
        "pickle beside the adapter",
        VERIFY,
        "is not named in lowres.json",
        damage=write("bundle/adapter_model.bin", PICKLE),
    ),
    Bad(
        "file added that would be read",
        VERIFY,
        "is not named in lowres.json",
        damage=write("bundle/chat_template.jinja", "{{ 1 }}"),
    ),
    Bad(
        "adapter not listed",
        VERIFY,
        "names no adapter_model.safetensors",
        damage=sealed(forget=("adapter_model.safetensors",)),
    ),
    Bad("probe missing", VERIFY, "lacks probe.safetensors", damage=remove("bundle/probe.safetensors")),
    Bad(
        "probe of something else",
        VERIFY,
        "does not hold token ids",
        damage=sealed(tensors("bundle/probe.safetensors", lambda held: held.pop("logits"))),
    ),
    Bad(
        "probe beyond the vocabulary",
        VERIFY,
        "beyond the model's",
        damage=sealed(tensors("bundle/probe.safetensors", lambda held: held["input_ids"].fill_(10**6))),
    ),
    Bad(
        "probe of another shape",
        VERIFY,
        "holds logits of (4, 3), not (4, 2)",
        damage=sealed(tensors("bundle/probe.safetensors", lambda held: held.update(logits=torch.zeros(4, 3)))),
    ),
    Bad(
        "passport too large",
        VERIFY,
        "is larger than",
        damage=lambda folder: os.truncate(folder / "bundle/lowres.json", 65 << 20),
    ),
    Bad("passport's scores changed", VERIFY, "is not what it was", damage=edit("bundle/lowres.json", scores={})),
    Bad("passport's machine changed", VERIFY, "is not what it was", damage=edit("bundle/lowres.json", machine="x")),
    Bad("passport nested", VERIFY, "lowres.json", damage=write("bundle/lowres.json", '{"a":' * 100_000)),
    Bad("passport of a newer format", VERIFY, "of a newer format", damage=edit("bundle/lowres.json", format=2)),
    Bad("passport with a strange key", VERIFY, "Extra inputs", damage=edit("bundle/lowres.json", run="touch executed")),
    Bad("file outside", VERIFY, "'../reviews.csv' is no name of a file", damage=files_table("../reviews.csv", RECORD)),
    Bad("file of an absolute path", VERIFY, "is no name of a file", damage=files_table("/etc/passwd", RECORD)),
    Bad("file of a name too long", VERIFY, "is no name of a file", damage=files_table("x" * 300, RECORD)),
    Bad("file called by a folder", VERIFY, "is no name of a file", damage=files_table("a\\..\\b", RECORD)),
    Bad("file linked outside", VERIFY, "a link to", damage=link("bundle/adapter_model.safetensors", "a.safetensors")),
    Bad(
        "adapter config names a path",
        VERIFY,
        "the base is ../../etc",
        damage=sealed(edit("bundle/adapter_config.json", base_model_name_or_path="../../etc")),
    ),
    Bad(
        "adapter config of another rank",
        VERIFY,
        "r is 64, but the adapter has 4",
        damage=sealed(edit("bundle/adapter_config.json", r=64)),
    ),
    Bad(
        "adapter config too large",
        VERIFY,
        "is larger than",
        damage=sealed(lambda folder: os.truncate(folder / "bundle/adapter_config.json", 2 << 20)),
    ),
    Bad(
        "adapter config nested",
        VERIFY,
        "cannot be read",
        damage=sealed(write("bundle/adapter_config.json", "[" * 100_000)),
    ),
    Bad(
        "recipe with a tag",
        VERIFY,
        "are not read",
        damage=sealed(write("bundle/recipe.yaml", "!!python/object/apply:os.system [touch executed]")),
    ),
    Bad(
        "bundle's tokenizer with its own code",
        "predict bundle x -q",
        "auto_map",
        damage=sealed(edit("bundle/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})),
    ),
    Bad("half a character to predict on", "predict bundle \udcff -q", "is not UTF-8"),
]

DISK = [
    Bad("place is a file", RUN.replace("--out out", "--out reviews.csv"), "reviews.csv exists"),
    Bad("place is taken", RUN.replace("--out out", "--out bundle"), "bundle exists"),
    Bad("place below a file", RUN.replace("--out out", "--out reviews.csv/out"), "reviews.csv"),
    Bad("name too long", RUN.replace("--out out", f"--out {'x' * 300}"), "x" * 300),
    Bad("merge into a place that is taken", "merge bundle base -q", "base exists"),
    Bad("predictions below a file", "predict bundle x -q --out reviews.csv/x", "cannot be written"),
    Bad("predictions into a folder", "predict bundle x -q --out base", "cannot be written"),
    Bad("bundle of a name too long", f"verify {'x' * 300} -q", "is not there"),
    Bad("base of a name too long", RUN + f" model.base=./{'x' * 300}", "no folder"),
    Bad("base of a longer path", f"base {'x/' * 3000}", "no folder"),
    Bad("rows to predict of a name too long", f"predict bundle --file {'x' * 300} -q", "no file"),
    Bad("rows to score of a name too long", f"evaluate bundle --data {'x' * 300}.csv -q", "no file"),
    Bad("base given of a name too long", f"verify bundle -q --base /{'x' * 300}", "no folder"),
    Bad("new recipe of a name too long", f"new {'x' * 300} --from sentiment-lora", "cannot be written"),
    Bad("merge into a name too long", f"merge bundle {'x' * 300} -q", "x" * 300),
    Bad("new recipe over another", "new mine --from sentiment-lora", "mine.yaml exists"),
]

TABLE = [*DATA, *RECIPE, *MODEL, *BUNDLE, *DISK]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `bundle`, `reviews.csv` and `mine.yaml`, which belong together."""
    folder = tmp_path_factory.mktemp("sound")
    base = tiny.base(folder / "base")
    data = tiny.reviews(folder / "reviews.csv")
    here = Path.cwd()
    os.chdir(folder)  # so that the bundle's base is one beside it, wherever the folder is copied
    try:
        made = recipe(Path(base.name), Path(data.name))
        (folder / "mine.yaml").write_text(made.to_yaml())
        run(made, Path("bundle"), device_name="cpu")
    finally:
        os.chdir(here)
    return folder


def snapshot(folder: Path) -> Mapping[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_table_is_large_and_no_row_stands_in_it_twice():
    assert len(TABLE) >= 80
    assert len({row.name for row in TABLE}) == len(TABLE)


def prepare(row: Bad, sound: Path, folder: Path) -> list[str]:
    """Make the folder of a row; return the words of its command."""
    shutil.copytree(sound, folder)
    if row.content is not None:
        write(row.file, row.content)(folder)
    row.damage(folder)
    return row.command.format(file=row.file).split(" ")


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_bad_input_is_one_error_and_nothing_is_lost(
    row: Bad, sound: Path, lowres: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "here"
    words = prepare(row, sound, folder)
    before = snapshot(folder)
    monkeypatch.chdir(folder)
    code, out, err = lowres(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert row.told in err
    assert "Traceback" not in err
    assert all(mark.isprintable() or mark == "\n" for mark in err)
    assert snapshot(folder) == before  # nothing lost, nothing written, nothing executed


@pytest.mark.parametrize("name", ["nested lists without end", "pickle called safetensors", "escapes in an argument"])
def test_a_process_of_its_own_tells_the_same(name: str, sound: Path, tmp_path: Path):
    row = next(row for row in TABLE if row.name == name)
    words = prepare(row, sound, tmp_path / "here")
    done = subprocess.run(
        [sys.executable, "-m", "lowres_ft", *words], cwd=tmp_path / "here", capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert row.told in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "here" / "executed").exists()
