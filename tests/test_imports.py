"""What is not asked for is not loaded: numerics know neither Flower nor Ray, a list of plug-ins no library of data."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = ("torch", "torchvision", "datasets", "flwr_datasets", "sklearn", "pyarrow", "scipy", "dp_accounting")
HEAVY = (*HEAVY, "flwr", "ray")
OF_DATA = {"torchvision", "datasets", "flwr_datasets", "sklearn", "pyarrow"}
NUMERICS = [
    "fed_dpsat",
    *("fed_dpsat.settings.config", "fed_dpsat.step.mechanism", "fed_dpsat.step.optimizers"),
    *("fed_dpsat.step.gradients.per_example", "fed_dpsat.step.loop", "fed_dpsat.data", "fed_dpsat.models"),
    "fed_dpsat.client.build",
]
SUITE = """
from fed_dpsat.testing import check_clipping
from fed_dpsat.step.clipping import FlatClipping
check_clipping(FlatClipping)
"""
STEPS = {
    "fed_dpsat.accounting": ("import fed_dpsat.accounting", set(HEAVY)),
    "plug-ins": (
        "from fed_dpsat import plugins; plugins.builtin('dataset'); plugins.builtin('partition')",
        OF_DATA | {"flwr", "ray"},
    ),
    **{name: (f"import {name}", {"flwr", "ray"}) for name in NUMERICS},
    "a suite of numerics": (SUITE, {"flwr", "ray"}),
    "fed_dpsat.flower.federation": ("import fed_dpsat.flower.federation", {"ray"}),
}
"""What is done, and what may not be loaded after it. Nothing is unloaded, so the strictest come first."""


def test_what_a_step_does_not_need_is_not_loaded():
    """In one fresh interpreter, one step after the other: the first that loads too much is named."""
    code = "import json, sys\nfor name, code in json.loads(sys.argv[1]).items():\n    exec(code, {})\n"
    code += f"    print(json.dumps([name, sorted(set({HEAVY!r}) & set(sys.modules))]))"
    steps = json.dumps({name: code for name, (code, _) in STEPS.items()})
    done = subprocess.run([sys.executable, "-c", code, steps], capture_output=True, text=True, check=True)
    found = dict(map(json.loads, done.stdout.splitlines()))
    assert {name: set(loaded) & STEPS[name][1] for name, loaded in found.items()} == {name: set() for name in STEPS}
    assert "flwr" in found["fed_dpsat.flower.federation"]
    assert "torch" in found["plug-ins"]
