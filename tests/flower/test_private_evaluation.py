"""Evaluation by clients in a run: charges before numbers, kills, the joint epsilon, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from fed_dpsat.accounting import PrivacyLedger
from fed_dpsat.accounting.evaluations import evaluation_event
from fed_dpsat.accounting.ledger import EVALUATIONS
from fed_dpsat.client.build import Experiment
from fed_dpsat.errors import SettingError
from fed_dpsat.flower import private_evaluation
from fed_dpsat.lab.report.comparing import compare
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import resume, simulate

CLIENTS = 4


def config(**settings):
    given = {"dataset": "digits", "num_clients": CLIENTS, "num_rounds": 3, "target_epsilon": 6.0, "delta": 1e-5}
    given |= {"evaluate": "clients", "holdout_share": 0.3, "evaluation_budget": 3.0}
    return RunConfig(**{**given, **settings})


def evaluations(path):
    """By round, the attempts at evaluations with the number of clients that paid."""
    with PrivacyLedger(path / "ledger.sqlite", readonly=True) as ledger:
        charged = ledger._cohorts("charges", "attempt >= ?", EVALUATIONS)
        return [(round, attempt - EVALUATIONS, len(cohort.clients)) for round, attempt, cohort in charged]


def stop_in(monkeypatch, place, round):
    """An interruption at that place of that round."""
    if place == "noise":
        make = private_evaluation.noised_totals

        def noised(*given, **named):
            if named["round"] == round:
                raise KeyboardInterrupt
            return make(*given, **named)

        monkeypatch.setattr(private_evaluation, "noised_totals", noised)
        return
    save = RunFolder.save_checkpoint

    def saved(folder, checkpoint):
        if checkpoint.round == round:
            raise KeyboardInterrupt
        save(folder, checkpoint)

    monkeypatch.setattr(RunFolder, "save_checkpoint", saved)


@pytest.mark.by_default("example")
@pytest.mark.parametrize("unit", ["example", "client"])
def test_the_epsilon_of_a_run_is_one_composition_of_training_and_evaluations(tmp_path, unit):
    from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    made = config(privacy_unit=unit)
    run = simulate(made, tmp_path / "run", progress=False)
    assert run["epsilon"] == pytest.approx(6.0, rel=2e-3)
    assert run["evaluation_epsilon"] == pytest.approx(3.0, rel=2e-3)
    accountant, noise = PLDAccountant(), evaluation_event(made).noise_multiplier
    accountant.compose(SelfComposedDpEvent(GaussianDpEvent(noise), 3))
    with PrivacyLedger(tmp_path / "run" / "ledger.sqlite", readonly=True) as ledger:
        for event in ledger.history(0):
            if event.noise_multiplier != noise:
                accountant.compose(event.to_dp_event())
        assert ledger.rounds_by_client()[0] == 3
    assert run["epsilon"] == pytest.approx(accountant.get_epsilon(made.delta), rel=0.01)
    assert evaluations(tmp_path / "run") == [(round, 0, CLIENTS) for round in (1, 2, 3)]
    assert run.rounds[0]["test_accuracy"] is None  # the initial model costs nothing
    assert run.rounds[0]["epsilon"] == 0
    assert run.rounds[3]["intervals"]["accuracy"] > 0
    assert run["intervals"] == run.rounds[3]["intervals"]
    assert run["evaluated_on"] == "clients"
    assert "(noise)" in repr(run)
    assert any("their metrics have noise" in note for note in compare([run]).notes)
    assert not (tmp_path / "run" / "quality.json").exists()  # it has exact numbers


def test_with_little_noise_the_metrics_are_those_of_the_held_out_examples(tmp_path):
    made = config(evaluation_budget=500.0, target_epsilon=1000.0, num_rounds=1)
    run = simulate(made, tmp_path / "run", progress=False)
    experiment = Experiment.build(made)
    held = np.concatenate(experiment.held)
    assert not set(held) & set(np.concatenate(experiment.partitions))
    assert experiment.unused_examples == 0
    train = experiment.dataset.train
    inputs, labels = train.batch(torch.from_numpy(held))
    exact = float((run.model()(inputs).argmax(1) == labels).float().mean())
    assert run["test_accuracy"] == pytest.approx(exact, abs=4 * run["intervals"]["accuracy"] + 0.01)


def test_a_charge_is_on_disk_before_its_numbers(tmp_path, monkeypatch):
    seen, make = [], private_evaluation.noised_totals

    def noised(*given, **named):
        seen.append((named["round"], evaluations(tmp_path / "run")[-1]))
        return make(*given, **named)

    monkeypatch.setattr(private_evaluation, "noised_totals", noised)
    simulate(config(evaluate_every=2), tmp_path / "run", progress=False)
    assert seen == [(2, (2, 0, CLIENTS)), (3, (3, 0, CLIENTS))]


@pytest.mark.by_default("*noise-system", "*line-seeded")
@pytest.mark.parametrize("source", ["seeded", "system"])
@pytest.mark.parametrize("place", ["noise", "line"])
def test_a_kill_neither_loses_nor_doubles_a_charge(tmp_path, monkeypatch, place, source):
    made = config(noise_source=source, target_epsilon=0.0, noise_multiplier=2.0)
    with monkeypatch.context() as patch:
        stop_in(patch, place, 2)
        with pytest.raises(KeyboardInterrupt):
            simulate(made, tmp_path / "run", progress=False)
    assert evaluations(tmp_path / "run")[-1] == (2, 0, CLIENTS)
    run = resume(tmp_path / "run", progress=False)
    planned = [(round, 0, CLIENTS) for round in (1, 2, 3)]
    seen_twice = [(2, 1, CLIENTS)] if (place, source) == ("line", "system") else []  # a release of another model
    assert evaluations(tmp_path / "run") == sorted(planned + seen_twice)
    if source == "seeded":
        whole = simulate(made, tmp_path / "whole", progress=False)
        assert json.dumps(run.rounds) == json.dumps(whole.rounds)


@pytest.mark.slow
def test_a_repeated_evaluation_leaves_out_clients_without_budget(tmp_path, monkeypatch):
    made = config(noise_source="system")
    with monkeypatch.context() as patch:
        stop_in(patch, "line", 3)
        with pytest.raises(KeyboardInterrupt):
            simulate(made, tmp_path / "run", progress=False)
    run = resume(tmp_path / "run", progress=False)
    assert run["epsilon"] <= 6.0
    assert (3, 1, CLIENTS) not in evaluations(tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"holdout_share": 0.0}, "holdout_share"),
        ({"evaluation_budget": 0.0}, "evaluation_budget"),
        ({"evaluation_budget": 6.0}, "evaluation_budget"),
        ({"evaluate": "server"}, "holdout_share"),
        ({"secure_aggregation": True}, "secure_aggregation"),
        ({"buffer_size": 2, "delay": "exponential"}, "buffer_size"),
        ({"validation_share": 0.1}, "validation_share"),
        ({"private": False}, "private"),
        ({"task": "multilabel"}, "task"),
        ({"task": "regression"}, "error_bound"),
        ({"task": "regression", "error_bound": 2.0}, "metric"),
        ({"metric": "auroc"}, "metric"),
        ({"evaluation_metrics": "roc"}, "evaluation_metrics"),
        ({"personal_layers": "head"}, "personal_layers"),
        ({"averaging": "ema"}, "averaging"),
        ({"budget_mode": "retire", "noise_multiplier": 2.0}, "budget_mode"),
        ({"client_table": "x.csv"}, "client_table"),
    ],
)
def test_what_clients_cannot_evaluate_is_refused_by_name(settings, named):
    with pytest.raises(SettingError, match=f"^{named}="):
        config(**settings)


def test_a_run_is_not_extended_beyond_the_rounds_that_its_noise_is_for(tmp_path):
    made = config(target_epsilon=0.0, noise_multiplier=2.0, num_rounds=1)
    simulate(made, tmp_path / "run", progress=False)
    with pytest.raises(SettingError, match="evaluations was calibrated"):
        resume(tmp_path / "run", overrides={"num_rounds": 2}, progress=False)
    with pytest.raises(SettingError, match="evaluation_budget"):
        dataclasses.replace(made, evaluate="server", holdout_share=0.0)
