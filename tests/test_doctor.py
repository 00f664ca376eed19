import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

from lowres_ft import doctor


def found(**options):
    return {finding.what: finding for finding in doctor.examine(probe=False, **options).findings}


def test_a_sound_machine_is_usable(lowres):
    code, printed, _ = lowres("doctor", "--no-probe", "--json")
    told = json.loads(printed)
    assert (code, told["usable"]) == (0, True)
    names = [finding["what"] for finding in told["findings"]]
    assert {"Python", "processor", "memory", "torch", "bitsandbytes", "GPU", "computes in", "attention"} <= {*names}
    assert not any(name.startswith("products in") for name in names)
    assert all(finding["advice"] or finding["state"] in ("good", "missing") for finding in told["findings"])


@pytest.mark.parametrize("name", ["torch", "transformers", "peft"])
def test_a_library_that_cannot_be_imported_is_told_with_its_error(name, lowres, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(doctor.libraries, "peft", lambda: __import__("peft"))
    code, printed, _ = lowres("doctor", "--no-probe")
    assert code == 2
    (line,) = [line for line in printed.splitlines() if line.split()[0] == name]
    assert "broken" in line
    assert "cannot be imported: " in line
    assert f"pip install --force-reinstall {name}" in printed


def test_without_bitsandbytes_it_works_but_not_in_8_bits(monkeypatch):
    def absent():
        raise ImportError("libbitsandbytes_cpu.so: cannot open shared object file")

    monkeypatch.setattr(doctor.libraries, "bitsandbytes", absent)
    told = found()
    assert told["bitsandbytes"].state == "broken"
    assert "libbitsandbytes_cpu.so" in told["bitsandbytes"].found
    assert told["int8 and nf4"].state == "missing"


def test_a_version_that_is_not_taken_is_named_with_the_one_that_is(monkeypatch):
    versions = {"transformers": "4.40.0"}
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or real(name))
    told = found()["transformers"]
    assert told.state == "broken"
    assert told.found == "4.40.0, which is not transformers>=5.0"
    assert told.advice == "pip install 'transformers>=5.0'"


def test_a_library_that_is_missing(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    told = found()
    assert told["torch"].state == "broken"
    assert told["bitsandbytes"].state == "missing"
    assert told["torch"].advice.startswith("pip install 'torch")


def test_features_of_the_processor_are_read(monkeypatch):
    text = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16 avx512_vnni\n"
    real = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, **o: text if str(self) == "/proc/cpuinfo" else real(self, **o))
    told = doctor._processor()
    assert told.state == "good"
    assert told.found.startswith("Some CPU, ")
    assert told.found.endswith("; amx_bf16, avx512_bf16, avx512_vnni, avx2")
    text = text.replace("avx512_bf16 amx_bf16", "")
    assert doctor._processor().state == "slow"


def test_a_folder_that_cannot_be_written_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda place, mode: False)
    told = found(place=tmp_path / "not" / "there")
    assert told["disk, here"].state == "broken"


def test_the_probe_measures(monkeypatch):
    from lowres_ft import speed

    monkeypatch.setattr(
        speed, "measured", lambda device: {"flops": {"float32": 3e11}, "bandwidth": 1.5e10, "link": 2e9}
    )
    told = list(doctor._speed())
    assert [one.found for one in told] == ["0.30 TFLOP/s", "15.0 GB/s", "2.0 GB/s"]


def test_rates_are_measured():
    from lowres_ft import speed

    rates = speed.Rates.model_validate(speed.measured("cpu", each=0.01))
    assert rates.flops.keys() == {"float32", "bfloat16"}
    assert min(*rates.flops.values(), rates.bandwidth, rates.link) > 1e6
    assert rates.flops_in("float16") == min(rates.flops.values())
