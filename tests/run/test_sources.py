"""Which files a plug-in is made of: its own and those of one's own that it imports, and nothing that is installed."""

from __future__ import annotations

import importlib
import sys

import pytest

from fed_dpsat.plugins import load
from fed_dpsat.run.sources import plugin_sources


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """``tree(name=text, ...)`` writes modules into a folder that is importable, and forgets them afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        importlib.invalidate_caches()
        return tmp_path

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def names(plugin):
    return set(plugin_sources(plugin))


def test_a_built_in_plugin_and_one_of_flower_have_none_of_ones_own(tree):
    assert names("dp-sat") == set()
    assert names("fed_dpsat.step.optimizers.dpsat:dpsat") == set()
    assert names("strategies.kalman:kalman") == set()
    assert names("flwr.serverapp.strategy:FedAdam") == {"flwr/serverapp/strategy/__init__.py"}


def test_a_file_and_all_that_it_imports_and_what_those_import(tree):
    at = tree(
        {
            "opt.py": "import json, torch\nimport one\nfrom two import name\ndef make():\n    import late\n",
            "one.py": "import three.deep.est as t\n",
            "two.py": "import one\nname = 1\n",  # in a circle
            "three/__init__.py": "",
            "three/deep/__init__.py": "",
            "three/deep/est.py": "from . import sister\nfrom ..aunt import x\nfrom fed_dpsat import DPSGD\n",
            "three/deep/sister.py": "",
            "three/aunt.py": "x = 1\n",
            "late.py": "",
            "bystander.py": "",
        }
    )
    assert names(f"{at}/opt.py:make") == {
        "opt.py", "one.py", "two.py", "three/__init__.py", "three/deep/__init__.py", "three/deep/est.py",
        "three/deep/sister.py", "three/aunt.py", "late.py",
    }  # fmt: skip


def test_a_module_of_a_package_with_the_packages_around_it(tree):
    tree(
        {
            "mine/__init__.py": "from .shared import x\n",
            "mine/shared.py": "x = 1\n",
            "mine/optim/__init__.py": "",
            "mine/optim/sgd.py": "def make(): ...\n",
            "mine/optim/adam.py": "def make(): ...\n",
        }
    )
    expected = {"mine/__init__.py", "mine/shared.py", "mine/optim/__init__.py", "mine/optim/sgd.py"}
    assert names("mine.optim.sgd:make") == expected  # not loaded yet
    load("optimizer", "mine.optim.sgd:make")
    assert names("mine.optim.sgd:make") == expected


def test_what_is_imported_by_a_name_that_only_the_run_knows(tree):
    at = tree(
        {
            "opt.py": "import importlib\nhelper = importlib.import_module('hel' + 'per')\nmake = helper.make\n",
            "helper.py": "def make(): ...\n",
        }
    )
    load("optimizer", f"{at}/opt.py:make")
    assert names(f"{at}/opt.py:make") == {"opt.py", "helper.py"}


def test_a_file_that_is_no_python_or_not_there_is_named_all_the_same(tree):
    at = tree({"opt.py": "def make(:\n"})
    assert names(f"{at}/opt.py:make") == {"opt.py"}
    assert names(f"{at}/gone.py:make") == {"gone.py"}
    assert names("nowhere.at.all:make") == set()


def test_a_network_of_a_library_is_made_of_the_file_that_describes_it(tree):
    folder = tree({"minilm/config.json": "{}"}) / "minilm"
    assert plugin_sources(f"transformers:{folder}") == {"config.json": folder / "config.json"}
    assert plugin_sources("timm:resnet18") == {}
