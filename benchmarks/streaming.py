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
from typing import Any

_GIB = 2**30
_EVERY = 0.01  # seconds between two looks at a process
_LENGTH = 128
_ROWS = 20
_CHANGES = (
    "method.rank=4",
    "train.steps=4",
    "train.batch_size=2",
    "budget.recompute=layers",
)
WAYS: dict[str, dict[str, Any]] = {
    "resident": {"offload": "none", "cold": False, "limited": False},
    "resident, limited": {"offload": "none", "cold": False, "limited": True},
    "passing, from the system's cache": {"offload": "layers", "cold": False, "limited": True},
    "passing, from the disk": {"offload": "layers", "cold": True, "limited": True},
}


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


def measured(way: str, work: Path, limit: int) -> dict[str, Any]:
    """Train one way."""
    how = WAYS[way]
    job = {"base": str(work / "base"), "rows": str(work / "rows.jsonl"), "length": _LENGTH, "cold": how["cold"]}
    job |= {"out": str(work / "found.json"), "changes": [*_CHANGES, f"budget.offload={how['offload']}"]}
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    Path(job["out"]).unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.streamed", str(work / "job.json")]
    seen = watched(command, limit if how["limited"] else None)
    found: dict[str, Any] = {"way": way, "limited": how["limited"], "most_resident": seen["most"], "exit": seen["exit"]}
    if seen["exit"]:
        return found | {"told": seen["told"].splitlines()[-1:]}
    return found | json.loads(Path(job["out"]).read_text(encoding="utf-8"))


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
    told += [f"disk, read in order: {record['disk_bytes_per_second'] / 1e9:.2f} GB/s"]
    told += [f"{'':<34} {'resident':>9} {'a step':>8} {'read':>9} {'GB/s':>6}  losses"]
    for one in record["runs"]:
        most = f"{one['most_resident']['VmRSS'] / 2**20:,.0f} MiB"
        if one["exit"]:
            told.append(f"{one['way']:<34} {most:>9} {'refused':>8}  {' '.join(one['told'])}")
            continue
        seconds = statistics.median(one["step_seconds"][1:])
        read = statistics.median(one["step_read_bytes"][1:])
        same = "as resident" if one["losses"] == record["runs"][0]["losses"] else "OTHERS"
        told.append(
            f"{one['way']:<34} {most:>9} {seconds:>6.1f} s {read / 1e9:>6.2f} GB {read / seconds / 1e9:>6.2f}  {same}"
        )
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description="Layers that pass through memory, beside layers that stay.")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/streaming"), help="Where the base lies.")
    parser.add_argument("--limit", type=float, default=1.0, help="GiB that a process may have of its own.")
    parser.add_argument("--out", type=Path, help="Where to write the record.")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    limit = round(given.limit * _GIB)
    record: dict[str, Any] = {"base_bytes": made(given.work), "limit_bytes": limit}
    record["disk_bytes_per_second"] = disk(given.work)
    record["runs"] = [measured(way, given.work, limit) for way in WAYS]
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines(record)))
    whole, _, *passing = record["runs"]
    same = all(
        not one["exit"] and all(one[name] == whole[name] for name in ("losses", "evaluated", "learned"))
        for one in passing
    )
    return 0 if same and all(one["most_resident"]["VmRSS"] <= limit for one in passing) else 1


if __name__ == "__main__":
    sys.exit(main())
