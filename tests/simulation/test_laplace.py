"""Runs with Laplace noise: charged, calibrated, shown and audited as such, and refused where it has no bound."""

from __future__ import annotations

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from fed_dpsat.accounting import PrivacyEvent, PrivacyLedger, epsilon
from fed_dpsat.accounting.event import LAPLACE, PrivacyError
from fed_dpsat.accounting.plans import make_plans
from fed_dpsat.cli import app
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.errors import InputError
from fed_dpsat.lab.audit.command import game_of
from fed_dpsat.lab.audit.game import play
from fed_dpsat.lab.report.words import _noise
from fed_dpsat.run.reading import load_run
from fed_dpsat.run.statement import read_statement
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate

CONFIG = RunConfig(
    optimizer="zeroth-order", optimizer_args="directions = 2", noise_distribution="laplace", clipping="l1", lr=0.01,
    target_epsilon=2.0, delta=1e-4, num_clients=3, num_rounds=2, local_steps=2,
)  # fmt: skip


def invoke(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("laplace") / "run"
    return folder, simulate(CONFIG, folder)


def test_what_is_charged_is_laplace_and_keeps_the_target(run):
    folder, summary = run
    event = make_plans(CONFIG)[0].event
    assert event == PrivacyEvent(noise_multiplier=event.noise_multiplier, sample_rate=0.5, steps=2, kind=LAPLACE)
    with PrivacyLedger(folder / "ledger.sqlite", readonly=True) as ledger:
        assert ledger.history(0) == (dataclasses.replace(event, steps=4),)
    assert summary["epsilon"] == epsilon([event, event], 1e-4) <= 2
    assert summary["epsilon"] > 1.99
    assert (summary["noise_distribution"], summary["noise_multiplier"]) == ("laplace", event.noise_multiplier)


def test_it_is_shown_as_laplace_and_without_a_bound_by_rdp(run):
    folder, _ = run
    statement = read_statement(folder)
    assert statement.epsilon_rdp is statement.clients[0].epsilon_rdp is None
    shown = " ".join(invoke("ledger", folder).output.split())
    assert "Laplace noise" in shown
    assert "none (RDP)" in shown
    assert _noise(load_run(folder)).startswith("Laplace noise, noise multiplier")
    settings = [f"--set={key}={value}" for key, value in CONFIG.settings().items() if key in (
        "noise_distribution", "clipping", "target_epsilon", "optimizer", "delta")]  # fmt: skip
    assert "Laplace noise_multiplier = " in " ".join(invoke("calibrate", *settings).output.split())
    found = json.loads(invoke("calibrate", "--json", *settings).stdout)
    assert found["noise_distribution"] == "laplace"
    assert found["table"][0]["epsilon_rdp"] is None


def test_an_optimizer_of_gradients_is_refused_before_anything_is_charged(tmp_path):
    with pytest.raises(InputError, match="releases gradients of parameters"):
        simulate(dataclasses.replace(CONFIG, optimizer="dp-sgd", optimizer_args=""), tmp_path / "run")
    assert not (tmp_path / "run" / "ledger.sqlite").exists()


@pytest.mark.parametrize(("kind", "config"), [("poisson_gaussian", CONFIG), (LAPLACE, RunConfig(noise_multiplier=1.0))])
def test_a_client_runs_no_event_of_another_kind(kind, config):
    experiment = Experiment.build(config)
    event = PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=2, kind=kind)
    with pytest.raises(PrivacyError, match=f"the assignment has kind='{kind}', the run noise_distribution="):
        experiment.client_round(0, Assignment(round=1, event=event), experiment.shared(1), None)


@pytest.mark.slow
@pytest.mark.parametrize("directions", [1, 2])
def test_a_game_on_it_is_below_the_ledger_and_finds_noise_that_is_too_small(directions):
    config = dataclasses.replace(
        CONFIG, optimizer_args=f"directions = {directions}", target_epsilon=0.0, noise_multiplier=0.4, sample_rate=1.0,
        num_rounds=1, local_steps=1, delta=1e-3,
    )  # fmt: skip
    charged = PrivacyEvent(noise_multiplier=0.4, sample_rate=1.0, steps=1, kind=LAPLACE)
    game = game_of(config, repetitions=400, confidence=0.95)
    honest = play(game)
    assert honest.epsilon_ledger == epsilon([charged], 1e-3)
    assert 0.5 < honest.epsilon_lower < honest.epsilon_ledger
    assert honest.epsilon_if_gaussian is None

    def quiet(member):
        return dataclasses.replace(member, mechanism=dataclasses.replace(member.mechanism, noise_multiplier=0.05))

    lying = dataclasses.replace(game, client=quiet, ledger=lambda *_: epsilon([charged], 1e-3))
    assert play(lying).broken
