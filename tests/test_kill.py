"""A few runs of `python -m tests.kill`, one for each phase."""

import re
import subprocess
import sys

import pytest


@pytest.mark.kill
def test_killed_runs_go_on_to_the_same_bytes():
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill", "--runs", "5", "--task", "classification", "--seed", "3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^5 runs, [56] kills, [01] runs killed twice, 0 wrong$", done.stdout, re.MULTILINE), done.stdout
