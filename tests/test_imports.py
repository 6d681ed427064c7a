"""What is not asked for is not loaded, and torchvision is imported beside any torch."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

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


OF_METRICS = {"torchmetrics", "torchvision", "pandas", "matplotlib", "transformers", "PIL", "sympy", "torch._dynamo"}
"""What the import of torchmetrics loads if it is there; a run computes metrics."""
LIBRARIES = {"numpy", *HEAVY, "opacus", *OF_METRICS}
OF_A_RUN = {"numpy", "torch", "flwr", "scipy", "dp_accounting"}
COMMANDS = {
    "--version": set(),
    "ledger --help": set(),
    "calibrate --help": set(),
    "list loggers": set(),
    "list optimizers": {"numpy", "torch"},
    "list": {"numpy", "torch", "flwr"},
    "run --set dataset=digits --set noise_multiplier=1 --set num_rounds=1 --out FOLDER": OF_A_RUN,
    "ledger FOLDER": OF_A_RUN,
    "list datasets": OF_A_RUN,
}
"""Commands, and which ``LIBRARIES`` they load; one after the other, so each has those of the commands before it."""
INVOKED = """
import json, sys
from typer.testing import CliRunner
from fed_dpsat.cli import app
for command in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, done.output
    print(json.dumps(sorted(set(json.loads(sys.argv[2])) & set(sys.modules))))
"""


def test_a_command_loads_the_libraries_that_it_uses(tmp_path):
    commands = [command.replace("FOLDER", str(tmp_path / "run")) for command in COMMANDS]
    given = json.dumps(commands), json.dumps(sorted(LIBRARIES))
    done = subprocess.run([sys.executable, "-c", INVOKED, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = dict(zip(COMMANDS, map(set, map(json.loads, done.stdout.splitlines())), strict=True))
    after_a_run = [command for command, expected in COMMANDS.items() if expected == OF_A_RUN]
    assert {c: loaded - OF_METRICS if c in after_a_run else loaded for c, loaded in found.items()} == COMMANDS


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_libraries_that_import_torchvision_are_imported_after_this_project():
    """In one fresh interpreter: the imports take seconds."""
    found = [name for name in ("torchvision", "timm", "peft") if importlib.util.find_spec(name) is not None]
    assert "torchvision" in found
    assert run(f"import fed_dpsat, {', '.join(found)}; print('imported')")[-1] == "imported"


WHOLE = """
import torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl(name, lambda dets, scores, iou_threshold: scores + 1, "CPU")
"""
REGISTRATIONS = """
import torch
for name in ("nms", "qnms"):
    torch.library.register_fake(f"torchvision::{name}", lambda dets, scores, iou_threshold: scores)
"""


@pytest.mark.by_default("an extension that does not load")
@pytest.mark.parametrize(
    ("extension", "prints"),
    [(WHOLE, ["torch.Size([3])", "[2.0, 2.0, 2.0]"]), ("", ["torch.Size([3])", "nms has no implementation"])],
    ids=["an extension that loads", "an extension that does not load"],
)
def test_operators_are_declared_only_if_the_extension_does_not_load(extension, prints, tmp_path):
    """A package of the same structure stands in for torchvision."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from torchvision import extension, _meta_registrations")
    (package / "extension.py").write_text(extension)
    (package / "_meta_registrations.py").write_text(REGISTRATIONS)
    code = """
import sys; sys.path.insert(0, {folder!r})
import fed_dpsat, torchvision, torch
assert torchvision.__file__.startswith({folder!r})
print(torch.ops.torchvision.nms(torch.ones(3, 4, device="meta"), torch.ones(3, device="meta"), 0.5).shape)
try:
    print(torch.ops.torchvision.nms(torch.ones(3, 4), torch.ones(3), 0.5).tolist())
except NotImplementedError:
    print("nms has no implementation")
"""
    assert run(code.format(folder=str(tmp_path))) == prints


@pytest.mark.slow
def test_without_the_repair_the_import_fails():
    """The wrong version: shape functions of operators that nobody declared."""
    with pytest.raises(AssertionError, match="operator torchvision::nms does not exist"):
        run(REGISTRATIONS)
