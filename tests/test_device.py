"""A machine's dtype, by a timing where units do not say it; its GPU's number; what it has of memory and its peak."""

import os

import psutil
import pytest
import torch

from lowres_ft import device, limits


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """Find a processor of some capabilities, on which products take so many seconds."""
    monkeypatch.setenv("LOWRES_FT_CACHE", str(tmp_path))
    timed = []

    def find(capabilities, taken=None):
        monkeypatch.setattr(device, "_capabilities", lambda: dict.fromkeys(capabilities, True))
        monkeypatch.setattr(device, "_timed_products", lambda: timed.append(taken) or taken)
        return device.find("cpu").dtype

    find.timed = timed
    return find


@pytest.mark.parametrize(("capabilities", "dtype"), [((), "float32"), (("amx_bf16", "avx512_bf16"), "bfloat16")])
def test_units_that_leave_no_doubt_are_not_timed(capabilities, dtype, processor):
    assert processor(capabilities) == dtype
    assert processor.timed == []


@pytest.mark.parametrize(("seconds", "dtype"), [(0.5, "bfloat16"), (1.7, "float32")])
def test_others_are_timed_once_and_the_choice_is_kept(seconds, dtype, processor):
    taken = {"float32": 1.0, "bfloat16": seconds}
    assert processor(("avx512_bf16",), taken) == dtype
    assert processor(("avx512_bf16",), {"float32": 1.0, "bfloat16": 2.2 - seconds}) == dtype
    assert processor.timed == [taken]


def test_products_are_timed_in_both():
    taken = device._timed_products()
    assert taken.keys() == {"float32", "bfloat16"}
    assert all(0 < seconds < 10 for seconds in taken.values())


@pytest.fixture
def gpu(monkeypatch):
    """Two GPUs, of which the second one is current: 6 GB are free, and 3 GB reserved of 4 GB at the most."""
    taken = {"max_memory_allocated": 10**9, "max_memory_reserved": 4 * 10**9, "memory_reserved": 3 * 10**9}
    told = {"is_available": True, "device_count": 2, "current_device": 1}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    told = {"get_device_capability": (8, 0), "get_device_name": "GPU", "mem_get_info": (6 * 10**9, 8 * 10**9)}
    for name, value in (taken | told).items():
        monkeypatch.setattr(torch.cuda, name, lambda index, value=value: {"cuda:1": value}[index])


@pytest.mark.usefixtures("gpu")
def test_a_gpu_without_a_number_is_the_current_one():
    assert device.find("cuda").device == "cuda:1"


@pytest.mark.usefixtures("gpu")
def test_of_a_gpu_the_context_counts_once_in_what_is_free_and_in_the_peak():
    assert device.free_bytes("cuda:1") == 9 * 10**9 + limits.context()
    assert device.peak_bytes("cuda:1") == 4 * 10**9 + limits.context()


@pytest.fixture
def group(monkeypatch, tmp_path):
    """Put this process, which takes 1 GiB itself, into a group of 4 GiB, of which it takes 3."""
    monkeypatch.setattr(device, "_GROUP", tmp_path)
    process = type("Process", (), {"memory_info": lambda _: type("Info", (), {"rss": 2**30})})
    monkeypatch.setattr(psutil, "Process", process)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2**40, "total": 2**41}))
    for name, told in (("memory.max", 4 * 2**30), ("memory.current", 3 * 2**30)):
        (tmp_path / name).write_text(f"{told}\n")
    return tmp_path


def test_files_that_a_group_can_give_away_are_free(group):
    assert device.free_bytes("cpu") == 2 * 2**30
    (group / "memory.stat").write_text(f"anon 7\ninactive_file {2**30}\nactive_file 9\n")
    assert device.free_bytes("cpu") == 3 * 2**30


def test_processes_of_a_host_share_what_is_free(group, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert device.free_bytes("cpu") == 2**30 + 2**28


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system keeps the peak")
def test_a_peak_that_is_forgotten_begins_anew():
    held = bytearray(2**29)
    held[:: 2**12] = b"1" * 2**17
    high = device.peak_bytes("cpu")
    del held
    device.forget_peak("cpu")
    assert device.peak_bytes("cpu") < high - 2**28
