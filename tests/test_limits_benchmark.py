"""`python -m benchmarks.limits`: what watches a run from outside, and what is told of two."""

import os
import signal
import subprocess
import sys

import pytest

from benchmarks import limits
from benchmarks.limits import Outcome

MIB = 2**20


def outcome(peak, losses, *, code=0, killed=False, error=""):
    report = {
        "curves": {"loss": list(enumerate(losses, 1))},
        "plan": {"recompute": "none"},
        "measured": {"tokens_per_second": 9.0},
        "notes": ["memory ran out in step 2", "another"],
    }
    return Outcome(code, killed, peak, 1.0, error, None if code else report)


@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read from /proc")
def test_children_are_counted_and_what_they_share_once():
    holds = "held = b'x' * (100 * 2**20)"
    forks = "import os, time; pid = os.fork(); more = b'y' * (50 * 2**20) if not pid else 0; print(1, flush=True)"
    child = subprocess.Popen(
        [sys.executable, "-c", f"{holds}; {forks}; time.sleep(60)"], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert child.stdout is not None
        assert [child.stdout.readline(), child.stdout.readline()] == [b"1\n"] * 2
        assert 150 * MIB < limits._held(child.pid) < 200 * MIB
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
    assert limits._held(child.pid) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it holds nothing")
def test_a_child_that_is_held_gets_no_more_data(monkeypatch):
    asks = "import sys; held = bytearray(200 * 2**20); sys.exit('error: nothing was refused')"
    command, popen = [sys.executable, "-c", asks], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: popen(command, **options))
    refused = limits.watched(["any"], 100 * MIB)
    assert (refused.code, refused.error) == (1, "")  # of a MemoryError
    assert limits.watched(["any"]).error == "error: nothing was refused"


def test_losses_are_compared_step_by_step(monkeypatch):
    asked = []

    def watched(arguments, most=None):
        asked.append((arguments, most))
        return outcome(1000 * MIB, [2.0, 1.0]) if most is None else outcome(550 * MIB, [2.0, 1.1])

    monkeypatch.setattr(limits, "watched", watched)
    found = limits.compare(("reviews",), 0.6)
    assert asked[1] == (["reviews", f"budget.memory={600 * MIB}B"], 600 * MIB)
    assert found["largest_relative_difference"] == pytest.approx(0.1)
    assert (found["steps"], found["last_losses"], found["held"]["peak"]) == (2, [1.0, 1.1], 550 * MIB)
    assert found["held"]["notes"] == ["memory ran out in step 2"]
    assert limits._line("a", found).endswith("exit 0  losses within 1.0e-01 over 2 steps")


def test_what_is_refused_or_killed_is_told_as_it_is(monkeypatch):
    held = outcome(500 * MIB, [], code=2, killed=True, error="error: this run needs more")
    monkeypatch.setattr(limits, "watched", lambda _, most=None: held if most else outcome(1000 * MIB, [2.0]))
    found = limits.compare(("reviews",), 0.6)
    assert found["largest_relative_difference"] is None
    assert limits._line("a", found).endswith("exit 2, killed  error: this run needs more")
    monkeypatch.setattr(limits, "watched", lambda _, most=None: held)
    with pytest.raises(RuntimeError, match="reviews fails without a bound: error: this run needs more"):
        limits.compare(("reviews",), 0.6)
