"""docs/optimizers.md works: its commands run, every method is in its table and has a line."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from fed_dpsat import RunConfig, plugins
from fed_dpsat.simulation import simulate
from fed_dpsat.step.optimizers.chain import split_chain

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "optimizers.md").read_text()
COMMANDS = re.findall(r"^fed-dpsat .*$", TEXT, flags=re.MULTILINE)
TABLE = re.findall(r"^\| `([\w-]+)` \|.*\|$", TEXT.partition("One line each")[0], flags=re.MULTILINE)
ON_DIGITS = [command for command in COMMANDS if "digits_dpsat" in command and "augmentations" not in command]
PRE_TRAINED = [command for command in COMMANDS if "_digits.toml" in command]


def config_of(command):
    program, verb, path, *rest = shlex.split(command)
    assert (program, verb) == ("fed-dpsat", "run")
    return RunConfig.load(ROOT / path, [value for value in rest if value not in ("--set", "--out", "runs/pretrained")])


def test_every_method_has_a_row_and_a_line():
    assert list(dict.fromkeys(TABLE)) == TABLE
    assert sorted(TABLE) == list(plugins.builtin("optimizer"))
    assert [config_of(command).optimizer for command in ON_DIGITS][: len(TABLE)] == TABLE


@pytest.mark.by_default("*optimizer=dp-sat --set rho*", "*optimizer=zeroth-order --set lr*", "*base_optimizer=disk")
@pytest.mark.parametrize("command", ON_DIGITS)
def test_its_line_trains(command, tmp_path):
    """As it stands, but for the number of rounds and clients and, where there is a budget, the search for the noise."""
    config = config_of(command)
    noise = {"noise_multiplier": 1.0, "target_epsilon": 0.0} if config.private else {}
    config = dataclasses.replace(config, num_rounds=2, num_clients=3, evaluate_every=2, **noise)
    summary = simulate(config, tmp_path / "run")
    assert summary["rounds_completed"] == 2
    assert summary["test_loss"] < 100
    assert (summary["epsilon"] == float("inf")) == (config.optimizer == "sam")


def test_the_chains_that_it_shows_are_the_ones_of_the_issue():
    chains = [[c.optimizer, *split_chain(c.base_optimizer)] for c in map(config_of, ON_DIGITS[len(TABLE) :])]
    alone = [["zeroth-order", "dp-sgd"]] * 2  # in several directions, and with Laplace noise
    assert chains == [["dp-sat", "disk"], ["dp-sat", "random-freeze"], ["dp-sat", "disk", "adam"], *alone]


def test_the_pre_trained_start_is_as_its_files_say():
    pre, head, unfrozen = (config_of(command) for command in PRE_TRAINED)
    assert not pre.private
    assert (head.train_layers, unfrozen.train_layers) == ("head", "head-then-all")
    assert head.start_from == "runs/pretrained"


def test_files_that_it_names_exist():
    for path in re.findall(r"`((?:fed_dpsat|simulations|docs|tests)/[\w/]+\.\w+)`", TEXT):
        assert (ROOT / path).exists(), path
