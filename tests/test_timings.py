"""What is timed on a machine: kept for later runs, but not where other work spoiled it."""

from typing import NamedTuple

import pytest

from lowres_ft import device, timings


@pytest.mark.parametrize(("others", "kept"), [(0.0, True), (100.0, False)])
def test_what_other_work_spoiled_is_measured_again(monkeypatch, tmp_path, others: float, kept: bool):
    machine = device.find("cpu")
    monkeypatch.setenv("LOWRES_FT_CACHE", str(tmp_path))
    spent = iter([0.0, others, 0.0, 0.0])
    monkeypatch.setattr(timings, "_others", lambda: next(spent))
    found = iter([1, 2])
    assert timings.once(machine, "", "what", lambda: next(found), alone=True) == 1
    assert timings.once(machine, "", "what", lambda: next(found), alone=True) == (1 if kept else 2)


class Spent(NamedTuple):
    user: float
    system: float
    idle: float
    iowait: float


def test_other_work_is_what_this_process_did_not_do(monkeypatch):
    monkeypatch.setattr(timings.psutil, "cpu_times", lambda: Spent(5.0, 1.0, 9.0, 2.0))
    monkeypatch.setattr(timings.time, "process_time", lambda: 4.0)
    assert timings._others() == 2.0


def test_what_need_not_be_alone_is_kept(monkeypatch, tmp_path):
    machine, found = device.find("cpu"), iter([1, 2])
    monkeypatch.setenv("LOWRES_FT_CACHE", str(tmp_path))
    monkeypatch.setattr(timings, "_others", iter(range(0, 10_000, 1000)).__next__)
    assert [timings.once(machine, "", "what", lambda: next(found)) for _ in range(2)] == [1, 1]
