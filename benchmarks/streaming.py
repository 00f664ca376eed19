"""A base larger than the memory it trains in: `python -m benchmarks.streaming [--work FOLDER] [--out FILE]`.

A Llama of 2 GiB in bf16 with random weights trains resident, and with its layers passing, in processes of their own. A
limit from outside (RLIMIT_DATA) refuses those that pass more memory of their own than `--limit`; mapped pages do not
count there, so the resident memory of each process is read from outside every 10 ms too. Layers pass twice: from the
system's cache, as where there is memory to spare, and from the disk, as on a machine that has no more than the limit.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from lowres_ft import allocator

_GIB = 2**30
_EVERY = 0.01  # seconds between two looks at a process
_LENGTH, _FEW = 128, 40  # tokens of a text
_ROWS = 20
_CHANGES = ("method.rank=4", "train.steps=4", "budget.recompute=layers")


class Way(NamedTuple):
    """How the base trains."""

    name: str
    offload: str
    cold: bool = False
    limited: bool = True
    few: bool = False
    """One short text a step, so that layers take longer to come than to compute; else two of 128 tokens."""

    def job(self, work: Path) -> dict[str, Any]:
        """What a process of its own is told."""
        changes = [*_CHANGES, f"train.batch_size={1 if self.few else 2}", f"budget.offload={self.offload}"]
        places = {"base": str(work / "base"), "rows": str(work / "rows.jsonl"), "out": str(work / "found.json")}
        return places | {"length": _FEW if self.few else _LENGTH, "cold": self.cold, "changes": changes}


WAYS = (
    Way("resident", "none", limited=False),
    Way("resident, limited", "none"),
    Way("passing, from the system's cache", "layers"),
    Way("passing, from the disk", "layers", cold=True),
    Way("resident, few tokens", "none", limited=False, few=True),
    Way("passing from the disk, few tokens", "layers", cold=True, few=True),
)


def watched(command: list[str], limit: int | None) -> dict[str, Any]:
    """Run a process; return its exit, the end of what it told, and the most memory that was resident."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    most = {"VmRSS": 0, "RssAnon": 0, "RssFile": 0}
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(command, preexec_fn=limited, stderr=told)
        while process.poll() is None:
            for name, value in resident(process.pid).items():
                most[name] = max(most[name], value)
            time.sleep(_EVERY)
        told.seek(0)
        return {"exit": process.returncode, "told": told.read().strip()[-300:], "most": most}


def resident(pid: int) -> dict[str, int]:
    """What of a process is resident, in bytes: all, its own, and of files; nothing where it has ended."""
    try:
        lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return {}
    wanted = ("VmRSS:", "RssAnon:", "RssFile:")
    return {fields[0].rstrip(":"): int(fields[1]) * 1024 for fields in lines if fields and fields[0] in wanted}


def disk(folder: Path, size: int = _GIB, part: int = 2**23) -> float:
    """Bytes a second of a file that is read from its begin to its end, while the system has nothing of it cached."""
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(size // part):
            file.write(os.urandom(part))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        room = bytearray(part)
        began = time.perf_counter()
        for at in range(0, size, part):
            os.preadv(file.fileno(), [room], at)
        return size / (time.perf_counter() - began)


def pages(work: Path) -> float:
    """Bytes a second of layers that come from the disk, read ahead, while nothing computes."""
    out = work / "found.json"
    (work / "job.json").write_text(json.dumps({"pages": True, "out": str(out)}), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "benchmarks.streamed", str(work / "job.json")], check=True)
    return float(json.loads(out.read_text(encoding="utf-8"))["bytes_per_second"])


def measured(way: Way, work: Path, limit: int) -> dict[str, Any]:
    """Train one way."""
    job = way.job(work)
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    Path(job["out"]).unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.streamed", str(work / "job.json")]
    seen = watched(command, limit if way.limited else None)
    found: dict[str, Any] = {**way._asdict(), "most_resident": seen["most"], "exit": seen["exit"]}
    if seen["exit"]:
        return found | {"told": seen["told"].rpartition(": ")[2]}
    trained: dict[str, Any] = json.loads(Path(job["out"]).read_text(encoding="utf-8"))
    return found | trained


def made(work: Path) -> int:
    """Make base and rows, if they are not there; return the bytes of the base's weights."""
    if not (work / "base").exists():
        command = "from benchmarks import shapes; from pathlib import Path; import sys; work = Path(sys.argv[1]);"
        command += "shapes.write_base('llama-1b', work / 'base', 'bfloat16');"
        command += f"shapes.write_rows(work / 'rows.jsonl', 'chat', {_LENGTH}, {_ROWS})"
        subprocess.run([sys.executable, "-c", command, str(work)], check=True)
    return sum(file.stat().st_size for file in (work / "base").glob("*.safetensors"))


def lines(record: dict[str, Any]) -> list[str]:
    """The record as a table."""
    told = [f"base of {record['base_bytes'] / _GIB:.2f} GiB, limit of {record['limit_bytes'] / _GIB:.2f} GiB"]
    rates = [record[f"{name}_bytes_per_second"] / 1e9 for name in ("disk", "pages")]
    told += ["disk, read in order: {:.2f} GB/s; layers that come while nothing computes: {:.2f} GB/s".format(*rates)]
    told += [f"{'':<34} {'resident':>9} {'a step':>8} {'processors':>10} {'read':>9} {'GB/s':>6}  losses"]
    for one in record["runs"]:
        most = f"{one['most_resident']['VmRSS'] / 2**20:,.0f} MiB"
        if one["exit"]:
            told.append(f"{one['name']:<34} {most:>9} {'refused':>8}  {one['told']}")
            continue
        seconds, busy, read = (
            statistics.median(one[f"step_{name}"][1:]) for name in ("seconds", "processor_seconds", "read_bytes")
        )
        figures = f"{seconds:>6.1f} s {busy:>8.1f} s {read / 1e9:>6.2f} GB {read / seconds / 1e9:>6.2f}"
        told.append(f"{one['name']:<34} {most:>9} {figures}  {'as resident' if same(one, record) else 'OTHERS'}")
    return told


def same(one: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether a run had the losses, learned the bytes and answered the values of the resident one of its kind."""
    if one["exit"]:
        return False
    whole = next(other for other in record["runs"] if other["few"] == one["few"])
    return all(one[name] == whole[name] for name in ("losses", "evaluated", "learned"))


def main() -> int:
    allocator.restart()  # as the command line does
    parser = argparse.ArgumentParser(description="Layers that pass through memory, beside layers that stay.")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/streaming"), help="Where the base lies.")
    parser.add_argument("--limit", type=float, default=1.0, help="GiB that a process may have of its own.")
    parser.add_argument("--out", type=Path, help="Where to write the record.")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    limit = round(given.limit * _GIB)
    record: dict[str, Any] = {"base_bytes": made(given.work), "limit_bytes": limit}
    record |= {"disk_bytes_per_second": disk(given.work), "pages_bytes_per_second": pages(given.work)}
    record |= {"load": os.getloadavg()[0], "runs": []}
    for way in WAYS:
        record["runs"].append(measured(way, given.work, limit))
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines(record)))
    passing = [one for one in record["runs"] if one["offload"] == "layers"]
    return 0 if all(same(one, record) and one["most_resident"]["VmRSS"] <= limit for one in passing) else 1


if __name__ == "__main__":
    sys.exit(main())
