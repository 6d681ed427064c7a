"""``fed-dpsat audit``: bounds, confidence, counts and the ledger's epsilon, in words and as JSON."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fed_dpsat.cli import app
from fed_dpsat.lab.audit.command import game_of
from fed_dpsat.settings.config import RunConfig

FAST = ["--set", "num_rounds=2", "--set", "num_clients=2", "--set", "noise_multiplier=2.0", "--set", "target_epsilon=0"]


def invoke(*args):
    return CliRunner().invoke(app, ["audit", *map(str, args)])


def test_words_say_bound_confidence_numbers_and_limits(tmp_path):
    (tmp_path / "config.toml").write_text("delta = 1e-4\nnoise_multiplier = 2.0\n")
    (tmp_path / "environment.json").write_text('{"objects": []}')
    result = invoke(tmp_path, *FAST, "--canaries", 40, "--mislabelled", "--repetitions", 20)
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    for said in (
        "Game on the mechanism: epsilon >= 0.000 with confidence 95% at delta 0.0001, for 2 releases",
        "20 repetitions in each of two worlds",
        "Canaries, gradient: epsilon >=",
        "Canaries, mislabelled: epsilon >=",
        "40 canaries,",
        "The ledger says epsilon <=",
        "The ledger's claim stands.",
        "does not mean that nothing is",
    ):
        assert said in words


def test_json_has_the_same(tmp_path):
    report = json.loads(invoke(*FAST, "--game", "--repetitions", 20, "--json").stdout)
    assert set(report) == {"game", "limits"}
    assert report["game"]["epsilon_lower"] <= report["game"]["epsilon_ledger"]
    assert not report["game"]["broken"]


@pytest.mark.parametrize(
    "more",
    [
        ["--canaries", 5, "--repetitions", 20],
        ["--confidence", 1.5],
        ["--game", "--repetitions", 2],
        ["--canaries", 40, "--repetitions", 20, "--set", "optimizer=zeroth-order"],
        ["--set", "privacy_unit=client"],
    ],
)
def test_bad_input_is_one_line(more):
    result = invoke(*FAST, *more)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_run_of_objects_is_not_described_by_its_settings(tmp_path):
    (tmp_path / "config.toml").write_text("noise_multiplier = 2.0\n")
    (tmp_path / "environment.json").write_text('{"objects": ["dataset"]}')
    result = invoke(tmp_path)
    assert result.exit_code == 2
    assert "it was given dataset" in result.stderr


@pytest.mark.parametrize(("local_steps", "rounds", "played"), [(1, 30, (8, 1)), (3, 30, (2, 3)), (20, 2, (1, 8))])
def test_a_game_plays_the_first_steps_of_a_run(local_steps, rounds, played):
    config = RunConfig(noise_multiplier=2.0, local_steps=local_steps, num_rounds=rounds)
    game = game_of(config, repetitions=20, confidence=0.9)
    assert (game.rounds, game.local_steps) == played
    assert (game.noise_multiplier, game.sample_rate) == (2.0, 0.5)


COMMANDS = re.findall(r"^fed-dpsat (.*)$", (Path(__file__).parents[3] / "docs" / "audit.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_documentation_are_commands(command):
    assert CliRunner().invoke(app, [*shlex.split(command), "--help"]).exit_code == 0


def test_an_option_that_there_is_not_would_be_found():
    assert CliRunner().invoke(app, ["audit", "--canary", "3", "--help"]).exit_code == 2
