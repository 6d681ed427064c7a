"""The unit "client": what a round releases, to an oracle; what one client can change in it; what each client pays.

Each check has a wrong version beside it that it finds.
"""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAdam, FedMedian
from torch import nn

from fed_dpsat import RunConfig, simulate
from fed_dpsat.accounting import LedgerError, PrivacyEvent, PrivacyLedger, epsilon
from fed_dpsat.client import unit as client_level
from fed_dpsat.client.build import Experiment
from fed_dpsat.errors import SettingError
from fed_dpsat.flower import client_app as client_app_module
from fed_dpsat.flower import round as rounds
from fed_dpsat.flower import sums
from fed_dpsat.flower.roster import Roster
from fed_dpsat.flower.sums import ClientRelease
from fed_dpsat.flower.wire import records
from fed_dpsat.run.statement import read_statement
from fed_dpsat.step.mechanism import GaussianMechanism, normals_like
from fed_dpsat.step.noise import SERVER, derive_generator

C, SIGMA = 0.05, 0.7
CONFIG = RunConfig(
    privacy_unit="client",
    optimizer="dp-sgd",
    noise_multiplier=SIGMA,
    delta=1e-2,
    clip_norm=C,
    lr=1.0,
    num_clients=6,
    clients_per_round=3,
    client_sampling="poisson",
    num_rounds=4,
    local_steps=2,
    partition="size-skew",
)
FIXED = dataclasses.replace(CONFIG, client_sampling="fixed", clients_per_round=4, num_rounds=1)
RARE = dataclasses.replace(CONFIG, clients_per_round=1, num_rounds=3, seed=2)


class Clients:
    """Honest clients whose replies are noted; those that are ``gone`` fail, and a ``liar`` is ten times as far."""

    def __init__(self, config, gone=(), liar=None, model=None):
        experiment = Experiment.build(config, model=model)
        self._app = client_app_module.make_client_app(lambda _: experiment)
        self._gone, self._liar = gone, liar
        self.moves: dict[int, list[dict[str, torch.Tensor]]] = {}

    def __call__(self, message, context):
        client = int(context.node_config["partition-id"])
        if client in self._gone:
            raise RuntimeError("switched off")
        reply = self._app(message, context)
        before = records.to_params(message.content.array_records[records.ARRAYS])
        after = records.to_params(reply.content.array_records[records.ARRAYS])
        move = {n: after[n].double() - before[n].double() for n in before}
        if client == self._liar:
            far = {n: (before[n] + 10 * move[n]).to(before[n].dtype) for n in before}
            reply.content[records.ARRAYS] = records.to_arrays(far)
        round = records.read_assignment(message.content).round
        self.moves.setdefault(round, []).append(move)
        return reply


def run(config, folder, **objects):
    summary = simulate(config, folder, **objects)
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    model = torch.load(folder / "checkpoint" / "model.pt", weights_only=True)["params"]
    return summary, lines, model


def flat(params):
    return np.concatenate([p.double().numpy().ravel() for p in params.values()])


def norm(params):
    return float(np.linalg.norm(flat(params)))


# What is released


def oracle(config, moves):
    """The model after all rounds, in float64: sum of moves, noise of the server's stream, the expected cohort."""
    model = {n: p.double() for n, p in Experiment.build(config).shared().items()}
    for round in range(1, config.num_rounds + 1):
        noise = derive_generator(config.seed, purpose="noise", client=SERVER, round=round)
        normals = normals_like(model, noise)
        for name, p in model.items():
            drawn = normals[name].double()
            total = sum((move[name] for move in moves.get(round, [])), torch.zeros_like(p))
            model[name] = p + (total + config.noise_multiplier * config.clip_norm * drawn) / config.cohort_size
    return model


def check_release(config, folder):
    clients = Clients(config)
    _, lines, model = run(config, folder, client_app=clients)
    expected = oracle(config, clients.moves)
    assert all(torch.allclose(model[n].double(), expected[n], atol=1e-6) for n in model)
    assert all(norm(move) <= C * 1.001 for moves in clients.moves.values() for move in moves)
    return lines


@pytest.mark.parametrize("config", [CONFIG, FIXED, RARE], ids=["poisson", "fixed", "with an empty round"])
def test_the_released_model_is_that_of_the_oracle(config, tmp_path):
    lines = check_release(config, tmp_path / "run")
    asked = [len(line["asked"]) for line in lines[1:]]
    assert (0 in asked) == (config is RARE)
    assert not any(line["kept_model"] for line in lines)


def by_size(config, monkeypatch):
    part_of = sums.part_of

    def weighted(client, reply, verdict, **bound):
        part = part_of(client, reply, verdict, **bound)
        if part.total:
            part.total = {n: t * len(Experiment.build(config).partitions[client]) / 300 for n, t in part.total.items()}
        return part

    monkeypatch.setattr(sums, "part_of", weighted)


def by_realised_cohort(config, monkeypatch):
    model = ClientRelease.model

    def realised(self, total, before, **key):
        mechanism = dataclasses.replace(self.mechanism, expected_batch_size=max(1.0, len(total.accepted)))
        return model(dataclasses.replace(self, mechanism=mechanism), total, before, **key)

    monkeypatch.setattr(ClientRelease, "model", realised)


def no_noise_if_empty(config, monkeypatch):
    model = ClientRelease.model

    def silent(self, total, before, **key):
        return model(self, total, before, **key) if total.accepted else before

    monkeypatch.setattr(ClientRelease, "model", silent)


def wrong_sigma(config, monkeypatch):
    privatize = GaussianMechanism.privatize

    def less(self, clipped_sum, generator):
        return privatize(
            dataclasses.replace(self, noise_multiplier=0.9 * self.noise_multiplier), clipped_sum, generator
        )

    monkeypatch.setattr(GaussianMechanism, "privatize", less)


@pytest.mark.parametrize(
    ("wrong", "config"),
    [(by_size, RARE), (by_realised_cohort, CONFIG), (no_noise_if_empty, RARE), (wrong_sigma, RARE)],
)
def test_another_release_is_found(wrong, config, tmp_path, monkeypatch):
    wrong(config, monkeypatch)
    with pytest.raises(AssertionError):
        check_release(config, tmp_path / "run")


def test_the_noise_has_its_deviation_in_an_empty_round(tmp_path):
    """Not thinner for fewer replies, and another in each attempt."""
    release = ClientRelease.of(CONFIG, SIGMA)
    before = records.to_arrays({"w": torch.zeros(40_000)})
    found = flat(records.to_params(release.model(sums.Part(), before, round=1, attempt=0)))
    expected = SIGMA * C / CONFIG.cohort_size
    assert np.std(found) == pytest.approx(expected, rel=0.02)  # 5.6 standard errors
    other = flat(records.to_params(release.model(sums.Part(), before, round=1, attempt=1)))
    assert abs(np.corrcoef(found, other)[0, 1]) < 0.03
    secret = dataclasses.replace(release, noise_source="system")
    twice = [flat(records.to_params(secret.model(sums.Part(), before, round=1, attempt=0))) for _ in range(2)]
    assert (twice[0] != twice[1]).mean() > 0.99
    assert np.std(twice[0]) == pytest.approx(expected, rel=0.02)


# What one client can change


class Parallel(nn.Module):
    """31 linear layers side by side: 62 tensors, each with a gradient as large as any other."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 10) for _ in range(31))

    def forward(self, x):
        return sum(layer(x.flatten(1)) for layer in self.layers) / 31


def check_sensitivity(folder):
    """Two federations, with and without client 0, the same noise: sums at most C apart, and with this lr just that."""
    torch.manual_seed(0)
    model = Parallel()
    config = dataclasses.replace(FIXED, clients_per_round=0, num_clients=4, lr=5.0)
    sums_ = []
    for gone in ((), (0,)):
        clients = Clients(config, gone=gone, model=model)
        _, lines, after = run(config, folder / f"without{gone}", client_app=clients, model=model)
        assert lines[-1]["accepted"] == 4 - len(gone)
        sums_.append(flat(after) * config.cohort_size)
    apart = float(np.linalg.norm(sums_[0] - sums_[1]))
    assert 0.9 * C < apart < 1.01 * C, apart / C


def test_one_client_moves_the_sum_by_at_most_c(tmp_path):
    check_sensitivity(tmp_path)


def per_tensor(config, monkeypatch):
    one = client_level._bounded
    monkeypatch.setattr(client_level, "_bounded", lambda change, c: {n: one({n: v}, c)[n] for n, v in change.items()})
    monkeypatch.setattr("fed_dpsat.flower.judge.excess", lambda *_: 0.0)


@pytest.mark.parametrize("wrong", [per_tensor, pytest.param(by_realised_cohort, marks=pytest.mark.slow)])
def test_another_sensitivity_is_found(wrong, tmp_path, monkeypatch):
    wrong(FIXED, monkeypatch)
    with pytest.raises(AssertionError):
        check_sensitivity(tmp_path)


def test_a_reply_beyond_the_bound_is_dropped_by_name_and_the_others_are_released(tmp_path):
    config = dataclasses.replace(FIXED, clients_per_round=0)
    _, lines, model = run(config, tmp_path / "liar", client_app=Clients(config, liar=2))
    _, _, without = run(config, tmp_path / "gone", client_app=Clients(config, gone=(2,)))
    assert "its change has a norm of 0.5, beyond clip_norm=0.05" in lines[-1]["dropped"]["2"]
    assert all(torch.equal(model[n], without[n]) for n in model)


def test_when_all_are_away_noise_is_released(tmp_path):
    config = dataclasses.replace(FIXED, dropout_rate=0.99)
    _, lines, model = run(config, tmp_path / "run")
    assert (lines[-1]["accepted"], lines[-1]["kept_model"]) == (0, False)
    start = Experiment.build(config).shared()
    moved = flat({n: model[n] - start[n] for n in model})
    assert np.std(moved) == pytest.approx(SIGMA * C / 4, rel=0.15)


# Whom it costs what


def check_every_client_pays(folder):
    summary, lines, _ = run(RARE, folder)
    with PrivacyLedger(folder / "ledger.sqlite", readonly=True) as ledger:
        assert ledger.privacy_unit == "client"
        histories = ledger.histories()
    event = PrivacyEvent(noise_multiplier=SIGMA, sample_rate=1 / 6, steps=3, kind="poisson_gaussian_clients")
    assert histories == dict.fromkeys(range(6), (event,))
    assert len({client for line in lines for client in line["asked"]}) < 6  # some were never drawn
    assert summary["epsilon"] == epsilon([event], RARE.delta)
    assert [line["epsilon"] for line in lines] == [0.0, *(
        epsilon([dataclasses.replace(event, steps=rounds)], RARE.delta) for rounds in (1, 2, 3)
    )]  # fmt: skip


def test_with_coins_every_round_costs_every_client(tmp_path):
    check_every_client_pays(tmp_path / "run")


def test_a_ledger_that_does_not_charge_those_who_were_not_drawn_is_found(tmp_path, monkeypatch):
    drawn = []
    cohort = Roster.cohort

    def noted(self, round):
        found = cohort(self, round)
        drawn[:] = found[0]
        return found

    monkeypatch.setattr(Roster, "cohort", noted)
    monkeypatch.setattr(Roster, "population", lambda self, round: list(drawn))
    with pytest.raises(AssertionError):
        check_every_client_pays(tmp_path / "run")


def test_a_cohort_of_fixed_size_pays_in_full_and_alone(tmp_path):
    config = dataclasses.replace(FIXED, num_rounds=2)
    summary, lines, _ = run(config, tmp_path / "run")
    taken = [client for line in lines for client in line["asked"]]
    statement = read_statement(tmp_path / "run")
    assert {line.client: line.rounds for line in statement.clients} == {c: taken.count(c) for c in range(6)}
    event = PrivacyEvent(noise_multiplier=SIGMA, sample_rate=1.0, steps=2, kind="poisson_gaussian_clients")
    assert summary["epsilon"] == epsilon([event], config.delta)
    assert "no amplification" in summary["threat_model"]


def test_noise_is_calibrated_to_the_rounds_and_the_coins(tmp_path):
    config = dataclasses.replace(CONFIG, noise_multiplier=0.0, target_epsilon=4.0, num_rounds=3)
    summary, *_ = run(config, tmp_path / "run")
    assert 3.95 < summary["epsilon"] <= 4.0
    full, *_ = run(dataclasses.replace(config, client_sampling="fixed"), tmp_path / "fixed")
    assert full["noise_multiplier"] > 1.3 * summary["noise_multiplier"]


def test_everything_says_its_unit(tmp_path):
    summary, *_ = run(RARE, tmp_path / "run")
    assert summary["privacy_unit"].startswith("one whole client")
    assert "the server is trusted" in summary["threat_model"]
    assert summary["declared_public"] == ["number of clients"]
    assert read_statement(tmp_path / "run").unit == summary["privacy_unit"]
    assert "epsilon_released" not in summary


def test_no_file_tells_how_many_examples_a_client_has(tmp_path):
    """A client's size is not public in this unit; a throughput in examples would be a sum of sizes."""
    summary, *_ = run(RARE, tmp_path / "run")
    timing = [json.loads(line) for line in (tmp_path / "run" / "timing.jsonl").read_text().splitlines()]
    assert summary["examples_per_second"] == 0
    assert {line["examples_per_second"] for line in timing} == {0}


def test_a_ledger_of_the_other_unit_is_refused(tmp_path):
    with PrivacyLedger(tmp_path / "ledger.sqlite") as ledger:
        ledger.charge(0, 1, 0, PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=1))
        with pytest.raises(LedgerError, match="no common epsilon"):
            ledger.charge(
                1, 1, 0, PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=1, kind="poisson_gaussian_clients")
            )
        assert ledger.rounds_by_client() == {0: 1}
    folder = tmp_path / "run"
    run(RARE, folder)
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace('privacy_unit = "client"', 'privacy_unit = "example"'))
    with pytest.raises(LedgerError, match="it is the ledger of another run"):
        read_statement(folder)
    (folder / "config.toml").write_text(text)
    with pytest.raises(SettingError, match="privacy_unit"):
        simulate(dataclasses.replace(RARE, resume=True, privacy_unit="example"), folder)


# The same whatever the way


def bits(a, b):
    return all(torch.equal(a[n], b[n]) for n in a)


def test_over_a_network_it_is_the_same(tmp_path, monkeypatch):
    _, lines, model = run(RARE, tmp_path / "here")
    monkeypatch.setattr(rounds, "SimulationGrid", type("None of them", (), {}))
    _, others, other = run(RARE, tmp_path / "network")
    assert bits(model, other)
    assert [line["epsilon"] for line in lines] == [line["epsilon"] for line in others]


@pytest.mark.slow
def test_stacked_it_is_nearly_the_same(tmp_path):
    _, _, model = run(CONFIG, tmp_path / "one")
    _, _, stacked = run(dataclasses.replace(CONFIG, stack_clients=3), tmp_path / "stacked")
    assert all(torch.allclose(model[n], stacked[n], atol=1e-5) for n in model)


def test_a_sparse_change_travels_sparse(tmp_path):
    config = dataclasses.replace(CONFIG, keep_share=0.1)
    _, _, model = run(config, tmp_path / "dense")
    sparse = dataclasses.replace(config, update_codec="top-k", update_share=0.1)
    summary, _, other = run(sparse, tmp_path / "sparse")
    assert all(torch.allclose(model[n], other[n], atol=1e-6) for n in model)
    assert summary["bytes_per_round"]["up"] < 0.25 * 4 * 650 * 3


def test_a_resumed_run_repeats_its_noise_and_with_system_noise_pays_again(tmp_path, monkeypatch):
    rounds = Experiment.client_round

    def killed_in_round_2(self, client, assignment, *args, **kwargs):
        if assignment.round == 2:
            raise KeyboardInterrupt
        return rounds(self, client, assignment, *args, **kwargs)

    _, _, whole = run(CONFIG, tmp_path / "whole")
    for source, attempts in (("seeded", 1), ("system", 2)):
        config, folder = dataclasses.replace(CONFIG, noise_source=source, clients_per_round=5), tmp_path / source
        config = CONFIG if source == "seeded" else config
        monkeypatch.setattr(Experiment, "client_round", killed_in_round_2)
        monkeypatch.setattr("fed_dpsat.simulation.try_federation", lambda *args: None)  # has a round 2 of its own
        with pytest.raises(KeyboardInterrupt):
            simulate(config, folder)
        monkeypatch.undo()
        _, _, model = run(dataclasses.replace(config, resume=True), folder)
        with PrivacyLedger(folder / "ledger.sqlite", readonly=True) as ledger:
            assert {e.steps for h in ledger.histories().values() for e in h} == {4 + attempts - 1}
        assert bits(whole, model) == (source == "seeded")


def test_the_seed_does_not_tell_who_is_drawn_if_it_must_not(tmp_path):
    config = dataclasses.replace(CONFIG, noise_source="system", num_clients=40, clients_per_round=20, num_rounds=1)
    drawn = [run(config, tmp_path / str(i))[1][-1]["asked"] for i in range(2)]
    assert drawn[0] != drawn[1]


def test_a_strategy_on_the_mean_is_post_processing_also_of_an_empty_first_round(tmp_path):
    config = dataclasses.replace(RARE, num_rounds=1)
    _, lines, model = run(config, tmp_path / "adam", strategy=FedAdam(eta=0.01))
    assert lines[1]["asked"] == []
    start = Experiment.build(config).shared()
    assert all((model[n] != start[n]).float().mean() > 0.99 for n in model)
    with pytest.raises(SettingError, match="privacy_unit=client releases nothing else"):
        simulate(config, tmp_path / "median", strategy=FedMedian())


# What is refused


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"clipping": "per-layer"}, "clipping"),
        ({"secure_aggregation": True}, "secure_aggregation"),
        ({"update_codec": "random-k"}, "update_codec"),
        ({"client_table": "clients.csv"}, "client_table"),
        ({"release_counts": True}, "release_counts"),
        ({"max_rounds_per_client": 3}, "max_rounds_per_client"),
        ({"privacy_unit": "example", "keep_share": 0.5}, "keep_share"),
        ({"clip_norm": math.inf}, "clip_norm"),
    ],
)
def test_what_would_break_the_bound_is_refused(changes, name):
    with pytest.raises(SettingError, match=f"^{name}="):
        dataclasses.replace(CONFIG, **changes)


def test_a_budget_ends_the_run_for_all_at_once(tmp_path):
    config = dataclasses.replace(CONFIG, budget_mode="retire", target_epsilon=6.0, num_rounds=50)
    summary, lines, _ = run(config, tmp_path / "run")
    assert summary["ended_early"]
    assert 5 < summary["epsilon"] <= 6
    assert len(lines) < 50


def test_without_privacy_changes_are_bounded_and_nothing_is_added(tmp_path):
    config = dataclasses.replace(FIXED, private=False, noise_multiplier=0.0, clip_norm=math.inf)
    clients = Clients(config)
    summary, _, model = run(config, tmp_path / "run", client_app=clients)
    start = Experiment.build(config).shared()
    moves = [flat(move) for move in clients.moves[1]]
    assert np.allclose(flat({n: model[n] - start[n] for n in model}), sum(moves) / 4, atol=1e-6)
    assert summary["epsilon"] == math.inf
