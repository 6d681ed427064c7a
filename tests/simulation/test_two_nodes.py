"""A cluster that is there is joined, and left running."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_two_nodes_give_the_bits_of_one_process():
    command = [sys.executable, "-m", "simulations.two_nodes"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 nodes at" in done.stdout
    assert "bits the same as in one process" in done.stdout
