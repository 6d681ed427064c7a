"""``fed-dpsat check``: all that a configuration names, without training."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from fed_dpsat.cli import app
from fed_dpsat.testing import configuration

PARTS = ["dataset", "partition", "model", "clipping", "optimizer", "strategy", "trial"]
FAST = ["--set", "noise_multiplier=2", "--set", "accountant=rdp", "--set", "num_clients=3"]


@pytest.fixture
def quick(monkeypatch):
    """Without the two suites that take seconds; they have tests of their own."""
    for name in ("check_clipping", "check_strategy"):
        monkeypatch.setattr(configuration, name, lambda factory: ["skipped"])


def test_a_good_configuration_is_fine_and_nothing_is_written(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["check", *FAST])
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines()] == PARTS
    assert all(": fine" in line for line in result.stdout.splitlines())
    assert not list(tmp_path.iterdir())


def test_what_is_not_fine_is_said_of_its_part_and_by_the_trial(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.py").write_text(
        "from torch import nn\nfew = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 9))\n"
        "class Strategy(__import__('flwr.serverapp.strategy').serverapp.strategy.FedAvg):\n"
        "    lock = None\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.lock = object()\n"
    )
    command = ["check", *FAST, "--set", "model=m.py:few", "--set", "strategy=m.py:Strategy", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.output
    found = json.loads(result.stdout)
    problems = {part["part"]: part["problem"] for part in found["parts"] if part["problem"]}
    assert not found["fine"]
    assert list(problems) == ["model", "trial"]
    assert "logits_are_one_row_per_example" in problems["model"]
    assert "make its last layer 10 wide" in problems["trial"]
    (strategy,) = (part for part in found["parts"] if part["part"] == "strategy")
    assert "cannot resume: Strategy.lock is a object" in strategy["note"]
    assert "NOT FINE" in CliRunner().invoke(app, command[:-1]).stdout


@pytest.mark.parametrize(
    ("setting", "words"), [("modle=linear", "did you mean model"), ("model=liner", "did you mean linear")]
)
def test_what_cannot_be_built_is_one_line(setting, words):
    result = CliRunner().invoke(app, ["check", *FAST, "--set", setting])
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
