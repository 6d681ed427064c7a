"""Numerics load neither Flower nor Ray: each module in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

NUMERICS = (
    "fed_dpsat", "fed_dpsat.mechanism", "fed_dpsat.per_example", "fed_dpsat.optimizers", "fed_dpsat.training",
    "fed_dpsat.privacy", "fed_dpsat.models", "fed_dpsat.data", "fed_dpsat.experiment", "fed_dpsat.config",
)  # fmt: skip


@pytest.mark.parametrize("module", NUMERICS)
def test_loads_neither_flower_nor_ray(module):
    code = f"import sys, {module}; print([m for m in ('flwr', 'ray') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_flower_loads_no_ray():
    code = "import sys, fed_dpsat.flower.federation; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
