"""Whole runs: the same seed gives the same bits whatever the workers, and the folder says what happened."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAdam
from torch import nn

from fed_dpsat.accounting import LedgerError, PrivacyEvent, PrivacyLedger, epsilon
from fed_dpsat.accounting.released import Cohort, epsilon_of_models
from fed_dpsat.client.build import Experiment
from fed_dpsat.data.digits import digits
from fed_dpsat.errors import DataError, InputError, SettingError
from fed_dpsat.flower.nodes import FederationError
from fed_dpsat.flower.strategy import PrivateStrategy
from fed_dpsat.run.reading import load_run
from fed_dpsat.run.statement import read_statement
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import resume, simulate
from fed_dpsat.step.optimizers import DPSGD
from fed_dpsat.tasks.classification import Classification

CONFIG = RunConfig(
    noise_multiplier=2.0, delta=1e-4, seed=1, num_clients=5, clients_per_round=2, num_rounds=4, local_steps=2
)


def model_of(folder):
    return torch.load(folder / "checkpoint" / "model.pt", weights_only=True)["params"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rounds_of(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def without_times(record):
    return {k: v for k, v in record.items() if not k.startswith("seconds")}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "reference"
    return folder, simulate(CONFIG, folder)


def test_the_folder_holds_what_a_reader_needs(reference):
    folder, summary = reference
    names = {p.name for p in folder.iterdir()}
    assert names >= {"config.toml", "environment.json", "rounds.jsonl", "ledger.sqlite", "checkpoint", "summary.json"}
    assert json.loads((folder / "summary.json").read_text())["epsilon"] == summary["epsilon"]
    assert summary.keys() >= {
        "test_accuracy", "test_loss", "epsilon", "delta", "accountant", "noise_multiplier", "clip_norm", "sample_rate",
        "local_steps", "rounds_completed", "num_clients", "optimizer", "strategy", "dataset", "seed", "seconds",
    }  # fmt: skip
    assert summary["status"] == "completed"
    assert summary["rounds_completed"] == 4


def test_epsilon_is_the_maximum_over_clients_of_all_their_rounds(reference):
    folder, summary = reference
    asked = [client for record in rounds_of(folder) for client in record["asked"]]
    most = max(asked.count(client) for client in range(5))
    assert most < 4  # so the test tells maximum, mean and all-rounds apart
    event = PrivacyEvent(noise_multiplier=2.0, sample_rate=0.5, steps=2)
    assert summary["epsilon"] == pytest.approx(epsilon([event] * most, 1e-4))
    with PrivacyLedger(folder / "ledger.sqlite", readonly=True) as ledger:
        assert ledger.rounds_by_client() == {c: asked.count(c) for c in range(5) if c in asked}


def test_epsilon_never_shrinks_from_round_to_round(reference):
    spent = [record["epsilon"] for record in rounds_of(reference[0])]
    assert spent[0] == 0
    assert spent == sorted(spent)


def test_the_same_seed_gives_the_same_bits(reference, tmp_path):
    simulate(CONFIG, tmp_path / "again")
    assert same(model_of(tmp_path / "again"), model_of(reference[0]))
    again, first = rounds_of(tmp_path / "again"), rounds_of(reference[0])
    assert [without_times(r) for r in again] == [without_times(r) for r in first]


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory, ray_cluster):
    """The run of ``reference`` on two workers: its folder, and how its rounds ended."""
    folder = tmp_path_factory.mktemp("runs") / "ray"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fed_dpsat.simulation.try_federation", lambda *_, **__: None)
        ends = ends_of_rounds(patch)
        simulate(dataclasses.replace(CONFIG, workers=2), folder)
    return folder, ends


def same_run(folder, reference):
    return same(model_of(folder), model_of(reference)) and [without_times(r) for r in rounds_of(folder)] == [
        without_times(r) for r in rounds_of(reference)
    ]


def test_the_same_bits_on_ray(reference, on_ray):
    assert same_run(on_ray[0], reference[0])


@pytest.mark.slow
def test_the_same_bits_on_one_worker(reference, tmp_path, ray_cluster):
    simulate(dataclasses.replace(CONFIG, workers=1), tmp_path / "ray")
    assert same_run(tmp_path / "ray", reference[0])


def test_another_seed_differs(reference, tmp_path):
    simulate(dataclasses.replace(CONFIG, seed=2), tmp_path / "other")
    assert not same(model_of(tmp_path / "other"), model_of(reference[0]))
    cohorts = [[r["asked"] for r in rounds_of(folder)] for folder in (tmp_path / "other", reference[0])]
    assert cohorts[0] != cohorts[1]


@pytest.mark.slow
def test_objects_stand_in_for_names_also_on_ray(tmp_path, ray_cluster):
    config = dataclasses.replace(CONFIG, clients_per_round=0, num_rounds=2)
    lines = []

    def run(folder, workers):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
        return simulate(
            dataclasses.replace(config, workers=workers), folder,
            dataset=digits(), model=model, optimizer=DPSGD(lr=0.5), on_round=lines.append,
        )  # fmt: skip

    run(tmp_path / "here", 0)
    run(tmp_path / "there", 1)
    assert same(model_of(tmp_path / "here"), model_of(tmp_path / "there"))
    assert model_of(tmp_path / "here")["1.weight"].shape == (16, 64)
    assert [line["round"] for line in lines] == [0, 1, 2] * 2


def test_a_strategy_object_is_wrapped(reference, tmp_path):
    summary = simulate(CONFIG, tmp_path / "adam", strategy=FedAdam(eta=0.01))
    assert summary["epsilon"] == reference[1]["epsilon"]
    assert not same(model_of(tmp_path / "adam"), model_of(reference[0]))


def test_a_run_that_is_not_private_says_so(tmp_path):
    config = dataclasses.replace(CONFIG, noise_multiplier=0.0, private=False, clip_norm=math.inf, num_rounds=1)
    assert simulate(config, tmp_path / "open")["epsilon"] == math.inf
    assert json.loads((tmp_path / "open" / "summary.json").read_text())["epsilon"] == "inf"


def test_a_delta_above_one_example_is_warned_about_with_the_number(tmp_path, caplog):
    summary = simulate(dataclasses.replace(CONFIG, delta=1 / 287, num_rounds=1), tmp_path / "run")
    assert (
        caplog.text.count("delta=0.00348432 is not below 1/287, 1 / (number of examples of the smallest client)") == 1
    )
    assert summary["delta_warning"] in caplog.text
    assert read_statement(tmp_path / "run").delta_warning == summary["delta_warning"]
    assert read_statement(tmp_path / "run", 1e-4).delta_warning == ""
    assert "1/287" in read_statement(tmp_path / "run", 0.5).delta_warning
    caplog.clear()
    below = simulate(dataclasses.replace(CONFIG, delta=0.0034, num_rounds=1), tmp_path / "below")
    assert "delta_warning" not in below
    assert "delta" not in caplog.text


def test_a_delta_above_one_client_is_warned_about(tmp_path, caplog):
    config = dataclasses.replace(CONFIG, delta=0.2, num_rounds=1, privacy_unit="client")
    summary = simulate(config, tmp_path / "run")
    assert "delta=0.2 is not below 1/5, 1 / (number of clients)" in summary["delta_warning"]
    assert caplog.text.count("not below") == 1
    assert read_statement(tmp_path / "run").delta_warning == summary["delta_warning"]


def test_accuracies_on_private_examples_are_said_to_be_released(tmp_path, reference):
    config = dataclasses.replace(CONFIG, validation_share=0.1, num_rounds=1)
    summary = simulate(config, tmp_path / "run")
    (released,) = summary["also_released"]
    assert "validation_share" in released
    assert "not covered by epsilon" in released
    assert reference[1]["also_released"] == []
    personal = dataclasses.replace(config, personal_layers="head", model="mlp")
    released = simulate(personal, tmp_path / "personal")["also_released"]
    assert len(released) == 2
    assert "public" not in " ".join(released)


def test_an_older_ledger_beside_a_newer_checkpoint_is_found(tmp_path):
    folder, older = tmp_path / "run", []

    def stop(record):
        if record["round"] == 2:
            older.append((folder / "ledger.sqlite").read_bytes())
        if record["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(CONFIG, folder, on_round=stop)
    newer = (folder / "ledger.sqlite").read_bytes()
    assert read_statement(folder).charges == 6
    (folder / "summary.json").unlink()  # as if it had been killed
    (folder / "ledger.sqlite").write_bytes(older[0])
    with pytest.raises(LedgerError, match="does not hold the 6 charges that were in it at round 3"):
        read_statement(folder)
    with pytest.raises(InputError, match="older copy"):
        load_run(folder)
    (folder / "ledger.sqlite").write_bytes(newer)
    with PrivacyLedger(folder / "ledger.sqlite") as ledger:  # a round that is under way
        ledger.charge(0, 4, 0, PrivacyEvent(noise_multiplier=2.0, sample_rate=0.5, steps=2))
    assert read_statement(folder).charges == 7


def test_a_run_that_went_on_after_its_summary_is_not_called_changed(tmp_path):
    """Interrupted, resumed, killed: ``summary.json`` is of the interruption, and its epsilon is no longer right."""

    def stop(record):
        if record["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(CONFIG, tmp_path / "run", on_round=stop)
    summary = (tmp_path / "run" / "summary.json").read_bytes()
    resumed = resume(tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_bytes(summary)
    assert read_statement(tmp_path / "run").epsilon == resumed["epsilon"]
    assert load_run(tmp_path / "run").epsilon == resumed["epsilon"] > json.loads(summary)["epsilon"]


def test_a_run_does_not_overwrite_another(reference):
    with pytest.raises(SettingError, match="not new or empty"):
        simulate(CONFIG, reference[0])


class Broken(nn.Module):
    """Works on the server, which never calls it in training mode; fails at every client."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        if self.training:
            raise RuntimeError("broken layer")
        return self.linear(x.flatten(1))


def test_every_client_failing_ends_the_run_with_a_readable_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("fed_dpsat.simulation.try_federation", lambda *args: None)  # which would have found it
    config = dataclasses.replace(CONFIG, clients_per_round=0)
    with pytest.raises(FederationError, match="broken layer"):
        simulate(config, tmp_path / "run", model=Broken())
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"
    with PrivacyLedger(tmp_path / "run" / "ledger.sqlite", readonly=True) as ledger:
        assert ledger.rounds_by_client() == dict.fromkeys(range(5), 1)


def test_an_interrupt_leaves_a_readable_folder(tmp_path):
    def stop(record):
        if record["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(CONFIG, tmp_path / "run", on_round=stop)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["rounds_completed"]) == ("interrupted", 2)
    assert len(rounds_of(tmp_path / "run")) == 3


def test_budgets_are_kept_and_the_run_ends_early_in_words(tmp_path):
    config = dataclasses.replace(CONFIG, clients_per_round=0, budget_mode="retire", target_epsilon=2.0, num_rounds=50)
    summary = simulate(config, tmp_path / "run")
    assert 1.4 < summary["epsilon"] <= 2.0
    assert "fewer than min_clients=1" in summary["ended_early"]
    assert set(summary["retired"]) == set(range(5))
    assert summary["status"] == "completed"
    assert summary["test_accuracy"] is not None
    statement = read_statement(tmp_path / "run")
    assert statement.epsilon == summary["epsilon"]
    assert {(row.state, row.budget) for row in statement.clients} == {("retired", 2.0)}


def test_a_client_that_is_asked_beyond_its_budget_refuses(tmp_path, monkeypatch):
    monkeypatch.setattr("fed_dpsat.flower.roster.affordable", lambda *_: True)  # a server that does not keep count
    config = dataclasses.replace(CONFIG, clients_per_round=0, budget_mode="retire", target_epsilon=2.0, num_rounds=50)
    with pytest.raises(FederationError, match=r"budget=2 is below .* refused, nothing was computed"):
        simulate(config, tmp_path / "run")


def test_a_ledger_that_was_changed_after_the_run_is_found(tmp_path):
    simulate(CONFIG, tmp_path / "run")
    read_statement(tmp_path / "run")
    with PrivacyLedger(tmp_path / "run" / "ledger.sqlite") as ledger:
        ledger.charge(0, 99, 0, PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=1))
    with pytest.raises(LedgerError, match="changed later"):
        read_statement(tmp_path / "run")


def test_the_epsilon_of_released_models_is_given_with_its_assumptions_where_clients_toss_coins(tmp_path, reference):
    poisson = dataclasses.replace(CONFIG, client_sampling="poisson", ascent_memory="zero", validation_share=2 / 1437)
    summary = simulate(poisson, tmp_path / "run")
    assert "other examples" in summary["epsilon_released_assumptions"]
    event = PrivacyEvent(noise_multiplier=2.0, sample_rate=0.5, steps=2)
    cohorts = [Cohort(len(line["asked"]), 5) for line in rounds_of(tmp_path / "run")[1:]]
    assert summary["epsilon_released"] == epsilon_of_models(event, cohorts, 2 / 5, 1e-4)
    assert "epsilon_released" not in reference[1]  # a cohort of fixed size is no set of coins
    carrying = simulate(dataclasses.replace(poisson, ascent_memory="client"), tmp_path / "carrying")
    assert carrying["epsilon_released"] is None  # a later update would tell of an earlier coin


def test_what_is_released_beyond_the_guarantee_is_repeated(reference, tmp_path):
    assert reference[1]["also_released"] == []
    summary = simulate(dataclasses.replace(CONFIG, release_counts=True), tmp_path / "run")
    assert "not covered by epsilon" in summary["also_released"][0]
    assert rounds_of(tmp_path / "run")[1]["released"].keys() == {
        str(c) for c in rounds_of(tmp_path / "run")[1]["asked"]
    }


def test_adaptive_clipping_and_several_passes_are_accounted(tmp_path):
    config = dataclasses.replace(CONFIG, clipping="adaptive", local_epochs=2, sample_rate=0.4, num_rounds=2)
    summary = simulate(config, tmp_path / "run")
    with PrivacyLedger(tmp_path / "run" / "ledger.sqlite", readonly=True) as ledger:
        events = {event for client in range(5) for event in ledger.history(client)}
    assert {(e.noise_multiplier, e.sample_rate, e.steps % 5) for e in events} == {(2.0, 0.4, 0)}
    assert summary["local_steps"] == 5  # 2 passes at 0.4


@pytest.mark.slow
def test_replies_that_workers_find_invalid_end_the_run_at_the_third_round_too(tmp_path, untried, ray_cluster):
    with pytest.raises(FederationError, match="no reply was valid, 3 round"):
        simulate(dataclasses.replace(CONFIG, workers=1, lr=1e20, num_rounds=8), tmp_path / "run")
    with PrivacyLedger(tmp_path / "run" / "ledger.sqlite", must_exist=True) as ledger:
        assert sum(ledger.rounds_by_client().values()) == 3 * CONFIG.clients_per_round


def test_the_callers_generators_are_afterwards_as_they_were(tmp_path):
    """Flower's strategies draw from random."""
    states = random.getstate(), np.random.get_state()[1].tolist()
    simulate(dataclasses.replace(CONFIG, num_rounds=1), tmp_path / "run")
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


def ends_of_rounds(monkeypatch):
    """Each call of ``PrivateStrategy.aggregate_train``: the round, and the types of what is handed to it."""
    aggregate, seen = PrivateStrategy.aggregate_train, []

    def watched(self, server_round, replies):
        replies = list(replies)
        seen.append((server_round, {type(reply).__name__ for reply in replies}))
        return aggregate(self, server_round, replies)

    monkeypatch.setattr(PrivateStrategy, "aggregate_train", watched)
    return seen


KINDS_OF_ROUNDS = {
    "sums": ({}, "Part"),
    "one by one": ({"strategy": "flwr.serverapp.strategy:FedMedian"}, "Message"),
    "buffered": ({"buffer_size": 1, "delay": "lognormal"}, "Message"),
    "secure aggregation": ({"secure_aggregation": True, "clients_per_round": 3}, "Part"),
    "unit client": ({"privacy_unit": "client", "optimizer": "dp-sgd"}, "Part"),
}


@pytest.mark.parametrize("kind", KINDS_OF_ROUNDS)
def test_each_round_ends_in_aggregate_train_once(kind, tmp_path, untried, monkeypatch):
    seen, (changes, handed) = ends_of_rounds(monkeypatch), KINDS_OF_ROUNDS[kind]
    simulate(dataclasses.replace(CONFIG, **changes), tmp_path / "run")
    assert seen == [(round, {handed}) for round in range(1, CONFIG.num_rounds + 1)]


def test_each_round_whose_sums_workers_make_ends_in_aggregate_train_once(on_ray):
    assert on_ray[1] == [(round, {"Part"}) for round in range(1, CONFIG.num_rounds + 1)]


def test_objects_are_those_that_names_would_make(tmp_path):
    config = dataclasses.replace(CONFIG, clients_per_round=0, num_rounds=1)
    named = simulate(dataclasses.replace(config, clipping="per-layer"), tmp_path / "named")
    built = Experiment.build(dataclasses.replace(config, clipping="per-layer"))
    given = simulate(
        config,
        tmp_path / "given",
        partition=built.partitions,
        task=Classification(tuple("0123456789")),
        clipping=built.clipping,
    )
    assert same(model_of(tmp_path / "named"), model_of(tmp_path / "given"))
    assert given["test_accuracy"] == named["test_accuracy"]


def test_parts_of_a_given_partition_that_overlap_are_refused(tmp_path):
    parts = [[client, 7] for client in range(CONFIG.num_clients)]
    with pytest.raises(DataError, match="example 7 is in parts 0 and 1"):
        simulate(CONFIG, tmp_path / "run", partition=parts)


SMALL = dataclasses.replace(CONFIG, num_rounds=1)


def test_without_a_folder_a_run_gets_a_new_one_that_the_result_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = simulate(SMALL), simulate(SMALL, dataset=digits())
    assert first.path != second.path
    assert [run.path.parent.name for run in (first, second)] == ["runs", "runs"]
    assert all(run.path.name.startswith("digits-2") for run in (first, second))
    assert same(model_of(first.path), model_of(second.path))
    named = simulate(dataclasses.replace(SMALL, out=str(tmp_path / "named")))
    assert named.path == tmp_path / "named"
    with pytest.raises(SettingError, match="resume=True is not possible without the folder of a run; name it as out"):
        simulate(dataclasses.replace(SMALL, resume=True))


def test_a_cell_with_a_folder_runs_again_with_overwrite(tmp_path):
    first = simulate(SMALL, tmp_path / "mine")
    with pytest.raises(SettingError, match=r"is not new or empty; .*overwrite=True in Python"):
        simulate(SMALL, tmp_path / "mine")
    again = simulate(dataclasses.replace(SMALL, seed=2), tmp_path / "mine", overwrite=True)
    assert (again.config.seed, first.config.seed, again["epsilon"]) == (2, 1, first["epsilon"])
    assert load_run(tmp_path / "mine").config.seed == 2


def test_the_result_is_that_of_the_folder_and_a_resumed_complete_run_is_it_too(reference):
    folder, run = reference
    assert run == load_run(folder) == resume(folder)
    assert run.rounds == load_run(folder).rounds


def test_flower_says_nothing_of_rounds_but_its_warnings_stay(tmp_path, monkeypatch):
    heard, flower = [], logging.getLogger("flwr")
    handler = logging.Handler()
    handler.emit = lambda record: heard.append((record.levelname, record.getMessage()))
    monkeypatch.setattr(flower, "handlers", [handler])
    simulate(SMALL, tmp_path / "quiet", on_round=lambda record: flower.warning("round %d", record["round"]))
    assert heard == [("WARNING", "round 0"), ("WARNING", "round 1")]
    heard.clear()
    monkeypatch.setattr(flower, "level", logging.INFO)  # set by somebody: not Flower's own
    simulate(SMALL, tmp_path / "loud")
    assert any("configure_train" in text for _, text in heard)
    assert flower.level == logging.INFO


@pytest.mark.parametrize("config", [{"num_rounds": 3}, "mine.toml", None])
def test_another_thing_than_a_configuration_is_told(config):
    with pytest.raises(SettingError, match=r"not a RunConfig; RunConfig.load\(FILE\)"):
        simulate(config)


def test_an_interrupted_cell_says_how_its_run_continues(tmp_path):
    def stop(record):
        if record["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as interrupted:
        simulate(SMALL, tmp_path / "run", on_round=stop)
    assert interrupted.value.__notes__ == [
        f"{tmp_path}/run has 1 finished rounds; `fed-dpsat resume {tmp_path}/run` continues"
    ]
    with pytest.raises(KeyboardInterrupt) as interrupted:
        simulate(SMALL, tmp_path / "objects", dataset=digits(), on_round=stop)
    assert interrupted.value.__notes__[0].endswith("resume=True), ...) with the same dataset continues")


def test_a_class_in_place_of_an_object_is_told(tmp_path):
    with pytest.raises(SettingError, match=r"it is a class; call it: FedAdam\(...\)"):
        simulate(SMALL, tmp_path, strategy=FedAdam)


def test_a_value_that_is_no_part_of_the_summary_is_told_with_near_ones(reference):
    folder, run = reference
    with pytest.raises(KeyError, match="did you mean test_accuracy"):
        run["accuracy"]
    assert resume(run) == load_run(folder)
