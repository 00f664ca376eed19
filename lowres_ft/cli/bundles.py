"""Commands about bundles and bases: evaluate, predict, merge, verify and base."""

import csv
import io
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer

from lowres_ft.cli.options import Base, BundleFolder, Device, Json, Quiet
from lowres_ft.errors import DataError, OutputError
from lowres_ft.harmless import cell
from lowres_ft.tasks.base import printable

if TYPE_CHECKING:
    from lowres_ft.bundle import Bundle
    from lowres_ft.merging import Merged
    from lowres_ft.model import Adapted
    from lowres_ft.plan import Plan
    from lowres_ft.tasks.base import Task

    Loaded = tuple[Adapted, Plan]

_TABLES = {".csv": ",", ".tsv": "\t"}
DtypeName = Literal["float32", "bfloat16", "float16"]
Dtype = Annotated[
    DtypeName | None,
    typer.Option("--dtype", help="Compute with the unquantized base in this dtype.  [default: as it was trained]"),
]


def evaluate(
    bundle: BundleFolder,
    data: Annotated[
        str | None, typer.Option("--data", help="Rows to score.  [default: the recipe's test rows]")
    ] = None,
    dtype: Dtype = None,
    base: Base = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score a bundle, with 95 % intervals."""
    from lowres_ft.bundle import open_bundle
    from lowres_ft.cli import summary
    from lowres_ft.cli.display import listening
    from lowres_ft.prediction import evaluate_bundle

    opened = open_bundle(bundle)
    model = loaded(opened, device, dtype, base, quiet)
    with tempfile.TemporaryDirectory(prefix="lowres-ft-") as work, listening(quiet) as listen:
        scores = evaluate_bundle(opened, *model, Path(work), data, listen=listen)
    print(json.dumps(scores.to_json()) if as_json else summary.scores_table(scores.to_json()))


def predict(
    bundle: BundleFolder,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="Texts; - reads lines from standard input.", show_default=False),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option("--file", help="A CSV, TSV, JSONL or Parquet file, or one text a line; - is standard input."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write to this file instead of the screen; a table if it ends in .csv or .tsv."),
    ] = None,
    uncalibrated: Annotated[
        bool, typer.Option("--uncalibrated", help="Probabilities as the model gives them, without the temperature.")
    ] = False,
    dtype: Dtype = None,
    base: Base = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Predict labels, entities, or a chat model's answers."""
    from lowres_ft import prediction
    from lowres_ft.bundle import open_bundle

    _require_one(texts, file)
    _require_folder(out)
    opened = open_bundle(bundle)
    if uncalibrated and opened.recipe.task.generates:
        raise typer.BadParameter("a model that writes gives no probabilities", param_hint="--uncalibrated")
    model = loaded(opened, device, dtype, base, quiet)
    with _writing(out) as sink:
        streams = opened.recipe.task.generates and not as_json and _delimiter(out) is None
        predictor = prediction.Predictor(*model, heard=streamed(sink) if streams else None, calibrated=not uncalibrated)
        if texts and texts != ["-"]:
            found = predictor.texts(texts)
        elif file not in (None, "-"):
            found = predictor(prediction.examples(opened, str(file)))
        else:
            found = predictor.texts(typed())
        if not _write(found, sink, _form(out, opened.recipe.task, as_json, streams)):
            raise DataError("there is no text to predict on: all that came is empty", hint="Give a text a line.")


def _form(out: Path | None, task: "Task", as_json: bool, streams: bool) -> Callable[[dict[str, Any]], Iterable[str]]:
    """What makes lines of a prediction: a table where the file's name asks for one."""
    if as_json:
        return lambda one: [json.dumps(one, ensure_ascii=False)]
    if (delimiter := _delimiter(out)) is not None:
        return table(delimiter)
    return lambda one: ["" if streams else task.line(one)]


def _delimiter(out: Path | None) -> str | None:
    """What separates the cells of the table that a file's name asks for; None where it asks for none."""
    return None if out is None else _TABLES.get(out.suffix.lower())


def _write(found: Iterable[dict[str, Any]], sink: TextIO, form: Callable[[dict[str, Any]], Iterable[str]]) -> int:
    """Write predictions as they come; return how many there were."""
    count = 0
    for one in found:
        count += 1
        sink.write("".join(f"{line}\n" for line in form(one)))
        sink.flush()
    return count


def table(delimiter: str) -> Callable[[dict[str, Any]], Iterable[str]]:
    """What makes a row of a table of each prediction, after a header; no cell is one that a spreadsheet computes."""
    header: list[str] = []

    def rows(one: dict[str, Any]) -> Iterator[str]:
        if not header:
            header.extend(one)
            yield row(header)
        yield row([one[name] for name in header])

    def row(values: list[Any]) -> str:
        text = io.StringIO()
        told = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
        # A cell is quoted that holds a mark which ends lines.
        csv.writer(text, delimiter=delimiter, lineterminator="\r\n").writerow(map(cell, told))
        return text.getvalue().removesuffix("\r\n")

    return rows


def _require_one(texts: list[str] | None, file: str | None) -> None:
    """Refuse to predict on nothing, or on two things."""
    if not texts and file is None:
        raise typer.BadParameter("give texts, --file F, or - for standard input", param_hint="TEXT")
    if texts and file is not None:
        raise typer.BadParameter("give texts or --file F, not both", param_hint="TEXT")


def _require_folder(out: Path | None) -> None:
    """Tell before a model is loaded that what comes of it could not be written."""
    if out is not None and not out.parent.is_dir():
        message = f"{out} cannot be written: there is no folder {out.parent}"
        raise OutputError(message, hint="Make it, or choose another place.")


def streamed(sink: TextIO) -> Callable[[str], None]:
    """What writes the pieces of an answer as they come."""

    def write(text: str) -> None:
        sink.write("\n".join(printable(line) for line in text.split("\n")))
        sink.flush()

    return write


def loaded(bundle: "Bundle", device: str, dtype: DtypeName | None, base: str | None, quiet: bool) -> "Loaded":
    """The model of a bundle, as it was trained or, where a dtype is named, on the unquantized base."""
    from lowres_ft import device as devices

    quantize = "none" if dtype else None
    with _fetching(quiet) as progress:
        return bundle.load(devices.find(device), dtype=dtype, quantize=quantize, base=base, progress=progress)


def typed() -> Iterator[str]:
    """The lines of standard input that are not empty."""
    try:
        lines = itertools.chain([next(sys.stdin, "").removeprefix("\ufeff")], sys.stdin)
        yield from (line.rstrip("\r\n") for line in lines if line.strip())
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not {error.encoding}: {error.reason}", hint="Send UTF-8 text.") from error


@contextmanager
def _writing(out: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that appears whole or not at all."""
    if out is None:
        yield sys.stdout
        return
    from lowres_ft.files import write_bytes

    with tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n") as sink:
        yield sink
        sink.seek(0)
        write_bytes(out, sink.read().encode())


def merge(
    bundle: BundleFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the merged model.", show_default=False)],
    data: Annotated[
        str | None, typer.Option("--data", help="Rows to compare on.  [default: the recipe's test rows]")
    ] = None,
    quantize: Annotated[
        Literal["int8", "nf4"] | None,
        typer.Option("--quantize", help="Write it in a format of bitsandbytes.  [default: in fp32]"),
    ] = None,
    base: Base = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fold the adapter into its base, and prove that nothing changed."""
    from dataclasses import asdict

    from lowres_ft import device as devices
    from lowres_ft.bundle import open_bundle
    from lowres_ft.merging import merge as merge_bundle

    opened = open_bundle(bundle)
    with _fetching(quiet):
        found = merge_bundle(opened, out, devices.find(device), base=base, rows=data, quantize=quantize)
    if as_json:
        print(json.dumps(asdict(found) | {"folder": str(found.folder)}))
        return
    _show_merge(found, opened.recipe.task.metric)


def _show_merge(found: "Merged", name: str) -> None:
    """What a merge was checked on, and what it changed of the metric called `name`."""
    print(f"compared on {found.rows:,} rows ({found.source}):")
    print(f"largest difference of a logit {found.largest_difference:.1e}, no answer differs")
    if found.from_measured is not None:
        print(f"to the model as it was measured: largest difference of a logit {found.from_measured:.1e}")
    if found.temperature is not None:
        print(f"its probabilities are not calibrated: divide its logits by {found.temperature:g} (README.md says so)")
    if found.quantized is None:
        print(f"merged model {found.folder}, fp32, for any program that reads transformers models")
        return
    lost = found.quantized
    metric = "" if lost.metric is None else f", {name} {lost.metric:.3f} after {found.metric:.3f}"
    print(f"in {lost.form}: largest difference of a logit {lost.largest_difference:.1e}, {lost.flipped} differ{metric}")
    print(f"merged model {found.folder}, {lost.form}, for any program that reads transformers models of bitsandbytes")


def verify(
    bundle: BundleFolder, base: Base = None, device: Device = "auto", quiet: Quiet = False, as_json: Json = False
) -> None:
    """Check every file, the base, and the logits of the probe rows."""
    from dataclasses import asdict

    from lowres_ft import device as devices
    from lowres_ft.bundle import open_bundle

    opened = open_bundle(bundle)
    with _fetching(quiet) as progress:
        found = opened.verify(devices.find(device), base, progress)
    if as_json:
        print(json.dumps(asdict(found)))
        return
    print(f"{found.files} files are as the passport says" + ("; the base is the one recorded" if found.base else ""))
    if found.largest_difference is None:
        print("the bundle holds no probe rows")
    else:
        how = "bit-equal" if found.exact else f"equal within {found.largest_difference:.1e}"
        print(f"logits of {found.probe_rows} probe rows are {how}")


def base(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A starter, a Hub id or a folder.", show_default=False)],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Print a base's folder for other programs, fetched if need be."""
    from lowres_ft import assets, bases
    from lowres_ft.parts import ModelSpec

    source = f"starter:{name}" if name in assets.STARTERS else name
    with _fetching(quiet) as progress:
        found = bases.resolve(ModelSpec(base=source), progress)
    print(
        json.dumps({"folder": str(found.folder), "name": found.name, "revision": found.revision})
        if as_json
        else found.folder
    )


@contextmanager
def _fetching(quiet: bool) -> Iterator[Any]:
    """A callback that shows downloads."""
    from lowres_ft.cli.display import listening
    from lowres_ft.events import Fetching

    with listening(quiet) as listen:
        yield lambda what, done, total: listen(Fetching(what, done, total))
