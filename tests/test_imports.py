"""Numerics load neither Flower nor Ray."""

from __future__ import annotations

import subprocess
import sys

NUMERICS = [
    "fed_dpsat",
    *("fed_dpsat.settings.config", "fed_dpsat.accounting", "fed_dpsat.step.mechanism", "fed_dpsat.step.optimizers"),
    *("fed_dpsat.step.gradients.per_example", "fed_dpsat.step.loop", "fed_dpsat.data", "fed_dpsat.models"),
    "fed_dpsat.client.build",
]


def test_numerics_load_neither_flower_nor_ray():
    """In one fresh interpreter, one after the other: the first that loads one is named."""
    code = f"""
import importlib, sys
for name in {NUMERICS}:
    importlib.import_module(name)
    print(name, [m for m in ('flwr', 'ray') if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{name} []" for name in NUMERICS]


def test_flower_loads_no_ray():
    code = "import sys, fed_dpsat.flower.federation; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
