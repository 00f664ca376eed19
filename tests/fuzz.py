"""`python -m tests.fuzz [READER]... --seconds N --seed S`: damaged files for every reader of foreign files.

Seconds are the processor's, so that they mean as much on a busy machine as on an idle one. On a disk half of the time
went into waiting for it; with TMPDIR in memory (/dev/shm) hardly any.
Sound files are damaged byte by byte and, where they hold JSON, value by value. A reader may take a file or refuse it
with a LowresError. Anything else, five seconds without an answer, or much memory is a finding: its file is kept, named
after reader and seed, and the exit status is 1. The file at hand lies in the folder before it is read, so that it is
there after a crash too.
"""

import argparse
import contextlib
import copy
import hashlib
import io
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lowres_ft.errors import LowresError

LIMIT = 5.0  # seconds of the processor for one file: others may use it too
_ROOM = 3 << 30  # bytes that reading small files may take beyond what the process has

TOKENS = [
    *(
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\r",
        b"\n",
        b"\r\n",
        b'"',
        b"'",
        b",",
        b";",
        b"\t",
        b"[",
        b"{",
        b"}",
        b"]",
    ),
    *(b"null", b"NaN", b"1e999", b"-1", b"0", b"true", b'"\\ud800"', b"\xed\xa0\x80", b"\xe2\x80\xae", b"\x1b[2J"),
    *(
        b"[" * 3000,
        b'{"a":' * 3000,
        b"9" * 5000,
        b"- " * 500,
        b"&a ",
        b"*a",
        b"<<: ",
        b"!!python/name:os.system ",
        b"../",
    ),
    *(b"18446744073709551615", b"1" * 30, b"a" * 70_000, b"%s%n", b"{{", b"B-", b"I-PER", b" ", b"\xc2\x85", b"# "),
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 1e308, -0.5, float("nan"), float("inf"), "", "x", "../x"),
    *("/etc/passwd", "\ud800", "\0", "\x1b[2J", "\u202e", "a" * 10_000, "9" * 5000, [], {}, [[]], [None], {"": None}),
    *(
        [1, "a"],
        [0] * 500,
        {"a": {"b": []}},
        "auto",
        "none",
        "float32",
        "F64",
        "BF16",
        "F4",
        [2**40, 2**40],
        [0, 0],
        [-1],
    ),
]


@dataclass
class Finding:
    """What a reader did that it must not do."""

    reader: str
    seed: int
    trace: str
    file: Path


class Hang(BaseException):
    """Raised in a reader that takes too long."""


@dataclass
class Reader:
    """A kind of file: a sound one, where it is put, and what reads it."""

    name: str
    sound: bytes
    place: Path
    read: Callable[[Path], object]
    after: Callable[[], object] = lambda: None
    """What makes the rest fit to the damaged file, such as the passport's hashes."""
    damage: Callable[[bytes, random.Random], bytes] | None = None
    findings: dict[str, Finding] = field(default_factory=dict)
    tried: int = 0
    taken: int = 0


# Damage


def bytewise(data: bytes, rng: random.Random) -> bytes:
    """Change a few places of a file."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, length = rng.randrange(len(found) + 1), rng.choice((1, 2, 8, 64, 1000))
        match rng.randrange(8):
            case 0 if found:
                found[at % len(found)] ^= 1 << rng.randrange(8)
            case 1:
                found[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                del found[at : at + length]
            case 3:
                found[at:at] = found[at : at + length]
            case 4:
                del found[at:]
            case 5:
                found[at : at + 8] = struct.pack("<q", rng.choice((0, 1, -1, 2**31, 2**62, rng.getrandbits(40))))
            case 6:
                other = rng.randrange(len(found) + 1)
                found[at : at + length] = found[other : other + length]
            case _:
                found[at:at] = rng.choice(TOKENS)
    return bytes(found)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(inner, (*path, key))


def changed(tree: Any, rng: random.Random) -> Any:
    """Change values of what JSON or YAML holds."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(list(_places(tree)))
        value = copy.deepcopy(rng.choice(VALUES))
        if not path:
            return value if rng.random() < 0.1 else tree
        above = tree
        for key in path[:-1]:
            above = above[key]
        match rng.randrange(5):
            case 0:
                del above[path[-1]]
            case 1 if isinstance(above, dict):
                above[rng.choice(["x", path[-1] + "s", "", "auto_map", "../x", "\ud800", "a\0", "x" * 5000])] = value
            case 2 if isinstance(above[path[-1]], list | dict | str | int) and not isinstance(above[path[-1]], dict):
                with contextlib.suppress(OverflowError):
                    above[path[-1]] = above[path[-1]] * rng.choice((0, 2, -1, 1000))
            case _:
                above[path[-1]] = value
        if not isinstance(tree, dict | list):
            break
    return tree


def json_damage(data: bytes, rng: random.Random) -> bytes:
    """Change JSON by its values, or by its bytes."""
    if rng.random() < 0.4:
        return bytewise(data, rng)
    return json.dumps(changed(json.loads(data), rng)).encode()


def lines_damage(data: bytes, rng: random.Random) -> bytes:
    """Change a line of JSON by its values, or the file by its bytes."""
    if rng.random() < 0.5:
        return bytewise(data, rng)
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json.dumps(changed(json.loads(lines[at]), rng)).encode()
    return b"\n".join(lines)


def yaml_damage(data: bytes, rng: random.Random) -> bytes:
    """Change a recipe by its values, or by its bytes."""
    from lowres_ft import yaml12

    if rng.random() < 0.5:
        return bytewise(data, rng)
    tree = changed(yaml12.loads(data.decode(), where="sound"), rng)
    return json.dumps(tree, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def header_damage(data: bytes, rng: random.Random) -> bytes:
    """Change a safetensors file by its header's values, or by its bytes."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.3:
        return bytewise(data[: size + 8], rng) + data[size + 8 :]
    header = json.dumps(changed(json.loads(data[8 : 8 + size]), rng)).encode()
    told = len(header) if rng.random() < 0.9 else rng.choice((0, 1, len(header) + 1, 2**40, 2**63))
    return told.to_bytes(8, "little") + header + data[8 + size :][: rng.choice((None, None, None, 0, 100))]


# Readers


def readers(work: Path) -> dict[str, Reader]:
    """Every reader, with sound files in `work`."""
    from tests import tiny

    found = [*_data(work), *_recipes(work), *_bundle(work), *_base(work)]
    place = work / "gguf" / "model.gguf"
    place.parent.mkdir()

    from lowres_ft import assets

    found.append(Reader("gguf", tiny.gguf(place).read_bytes(), place, assets.convert))
    return {reader.name: reader for reader in found}


def _data(work: Path) -> Iterator[Reader]:
    import pyarrow as pa
    from pyarrow import parquet

    from lowres_ft import readers as rows_of
    from lowres_ft import registry
    from lowres_ft.data import by_role

    labelled = [{"text": f'a {word} film, "so" ümlaut', "label": label} for word in "abc" for label in ("bad", "good")]
    tagged = {"words": ["Ann", "moved"], "tags": ["B-PER", "O"], "entities": [{"start": 0, "end": 3, "label": "PER"}]}
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    table = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist([row | tagged for row in labelled]), table)
    head = [",".join(f'"{name}"' for name in labelled[0])]
    csv_rows = [",".join('"' + value.replace('"', '""') + '"' for value in row.values()) for row in labelled]
    lines = [json.dumps(row, ensure_ascii=False) for row in (*labelled, tagged | {"text": "Ann moved"}, chat)]
    sound = {
        "csv": "\n".join(head + csv_rows).encode(),
        "tsv": b'text\tlabel\na film\tbad\n"b\tc"\tgood\n',
        "jsonl": "\n".join(lines).encode(),
        "json": f"[{','.join(lines)}]".encode(),
        "parquet": table.getvalue(),
        "conll": b"-DOCSTART- -X- O\n\n# id = 1\nAnn NNP B-PER\nmoved VB O\n\nNew\tJJ\tB-LOC\nYork\tNN\tI-LOC\n",
    }
    tasks = [registry.load("tasks", name)() for name in registry.names("tasks")]

    def read(path: Path) -> None:
        for where, row in rows_of.rows(str(path)):
            for task in tasks:
                with contextlib.suppress(LowresError):
                    task.read(by_role(row, where, task.forms, {}), where)

    damages = {"jsonl": lines_damage, "json": json_damage}
    for name, content in sound.items():
        yield Reader(name, content, work / f"rows.{name}", read, damage=damages.get(name))


def _recipes(work: Path) -> Iterator[Reader]:
    from lowres_ft.recipe import load_recipe, shipped

    sound = shipped()["sentiment-lora"].read_bytes()
    yield Reader("recipe", sound, work / "mine.yaml", load_recipe, damage=yaml_damage)
    typed = b"method.rank=8\ntask.labels=[a, 'b']\ndata.columns={text: x}\nmethod.kind=dora\ntrain.learning_rate=3e-4"

    def overridden(path: Path) -> None:
        pairs = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
        load_recipe("sentiment-lora", pairs)

    yield Reader("overrides", typed, work / "typed.txt", overridden)


def _bundle(work: Path) -> Iterator[Reader]:
    from lowres_ft import bundle as bundles
    from lowres_ft import device
    from lowres_ft.border import read_adapter, read_tensors
    from lowres_ft.pipeline import run
    from lowres_ft.prediction import Predictor
    from lowres_ft.probes import Probe
    from tests import tiny
    from tests.conftest import recipe

    base = tiny.base(work / "base")
    folder = run(recipe(base, tiny.reviews(work / "reviews.csv")), work / "bundle", device_name="cpu").folder

    def resealed(name: str) -> Callable[[], object]:
        def seal() -> None:
            path = folder / "lowres.json"
            passport = json.loads(path.read_bytes())
            passport.pop("digest", None)  # an attacker leaves it out
            content = (folder / name).read_bytes()
            passport["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
            path.write_text(json.dumps(passport))

        return seal

    def of(name: str, read: Callable[[Path], object], damage: Any, after: Any = lambda: None) -> Reader:
        return Reader(name, (folder / name).read_bytes(), folder / name, read, after, damage)

    def opened(path: Path) -> object:
        return bundles.open_bundle(folder)

    def verified(path: Path) -> object:
        return bundles.open_bundle(folder).verify(device.find("cpu"))

    def predicted(path: Path) -> object:
        loaded = bundles.open_bundle(folder).load(device.find("cpu"))
        return list(Predictor(*loaded).texts(["the film was good"]))

    yield replace(of(bundles.PROBE, verified, header_damage, resealed(bundles.PROBE)), name="verify")
    yield replace(of(bundles.ADAPTER, predicted, header_damage, resealed(bundles.ADAPTER)), name="predict")
    yield of("lowres.json", opened, json_damage)
    yield of("adapter_config.json", opened, json_damage, resealed("adapter_config.json"))
    yield of("recipe.yaml", opened, yaml_damage, resealed("recipe.yaml"))
    yield of("adapter_model.safetensors", read_adapter, header_damage)
    yield of("probe.safetensors", lambda path: Probe.of(read_tensors(path), path), header_damage)


def _base(work: Path) -> Iterator[Reader]:
    from lowres_ft import bases, profiles
    from lowres_ft.parts import ModelSpec
    from lowres_ft.tokenizing import load_tokenizer
    from tests.conftest import prepare, recipe

    base = work / "base"
    sound = recipe(base, work / "reviews.csv")
    number = iter(range(10**9))

    def loaded(path: Path) -> None:
        place = work / f"prepared-{next(number)}"
        try:
            prepare(sound, place)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def profiled(path: Path) -> None:
        found = bases.resolve(ModelSpec(base=str(base)))
        profiles.profile(found, sound.task)

    def tokenized(path: Path) -> None:
        tokenizer = load_tokenizer(base)
        sound.task.prepare(tokenizer)
        sound.task.encode(tokenizer, [sound.task.bare("the film was good \ufeff \u202e", "here")])

    for name, read, damage in (
        ("config.json", profiled, json_damage),
        ("tokenizer.json", tokenized, json_damage),
        ("tokenizer_config.json", tokenized, json_damage),
        ("model.safetensors", loaded, header_damage),
    ):
        yield Reader(name, (base / name).read_bytes(), base / name, read, damage=damage)
    shards = work / "shards"
    shards.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(base / "model.safetensors", shards / name)
    index = {"metadata": {"total_size": 9}, "weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    place = shards / "model.safetensors.index.json"
    yield Reader(
        place.name, json.dumps(index).encode(), place, lambda _: bases.weight_files(shards), damage=json_damage
    )


# The loop


def attempt(reader: Reader, data: bytes) -> str | None:
    """Let a reader read; the trace of what it did that it must not do."""

    def stop(*_: object) -> None:
        raise Hang

    reader.place.write_bytes(data)
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            reader.after()
            reader.read(reader.place)
    except LowresError as error:
        str(error).encode("utf-8", "surrogatepass")
        return None
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 (a panic of Rust is no Exception)
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    reader.taken += 1
    return None


def damaged(reader: Reader, seed: int) -> bytes:
    """The file of a seed."""
    rng = random.Random(f"{reader.name} {seed}")
    return (reader.damage or bytewise)(reader.sound, rng)


def fuzz(reader: Reader, seed: int, keep: Path, *, seconds: float = 1e9, files: int = sys.maxsize) -> None:
    """Try files until the processor's time or their number is over."""
    end = time.process_time() + seconds
    number = seed
    while time.process_time() < end and number < seed + files:
        try:
            data = damaged(reader, number)
        except MemoryError:  # values multiplied again and again: no file that this process could write
            number += 1
            continue
        if trace := attempt(reader, data):
            frames = [line for line in trace.splitlines() if line.startswith("  File")]
            key = " ".join(frames[-1:]) + trace.splitlines()[-1].partition(":")[0]
            if key not in reader.findings:
                file = keep / f"{reader.name}.{number}"
                file.write_bytes(data)
                reader.findings[key] = Finding(reader.name, number, trace, file)
                print(f"{reader.name}: seed {number}, kept as {file}\n{trace}", flush=True)
        reader.tried += 1
        number += 1
    reader.place.write_bytes(reader.sound)
    with contextlib.suppress(LowresError):
        reader.after()


def _bound() -> None:
    """Let what wants much memory fail."""
    with open("/proc/self/status", encoding="utf-8") as status:
        held = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (held + _ROOM, resource.RLIM_INFINITY))


def main() -> int:
    """Fuzz the readers that are named, or all; 1 where something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("reader", nargs="*")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the processor, for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        known = readers(Path(work))
        if unknown := [name for name in options.reader if name not in known]:
            parser.error(f"no reader {unknown[0]}; there are {', '.join(known)}")
        options.keep.mkdir(parents=True, exist_ok=True)
        _bound()
        chosen = [known[name] for name in options.reader or known]
        for reader in chosen:
            fuzz(reader, options.seed, options.keep, seconds=options.seconds)
            found = len(reader.findings)
            print(f"{reader.name}: {reader.tried:,} files, {reader.taken:,} taken, {found} findings", flush=True)
    return int(any(reader.findings for reader in chosen))


if __name__ == "__main__":
    sys.exit(main())
