"""Asynchronous rounds: who sets out and arrives by hand, what it costs, and what arrives late counts for."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAvg, FedMedian

from fed_dpsat.accounting import PrivacyLedger
from fed_dpsat.errors import SettingError
from fed_dpsat.flower.buffered import Buffer
from fed_dpsat.flower.nodes import FederationError
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import resume, simulate

pytestmark = pytest.mark.usefixtures("untried")  # the trial has tests of its own: tests/client/test_trial.py

CONFIG = RunConfig(
    **{"noise_multiplier": 2.0, "delta": 1e-4, "seed": 1, "num_clients": 8, "clients_per_round": 4, "num_rounds": 6},
    **{"buffer_size": 2, "delay": "lognormal", "dropout_rate": 0.2, "max_rounds_per_client": 4, "local_steps": 2},
)
DURATIONS = {0: 1.0, 1: 5.0, 2: 2.0, 3: 9.0}


def lasting(client, round):
    return DURATIONS[client]


def make_buffer(size=1, in_flight=4, staleness_exponent=0.5):
    return Buffer(size=size, in_flight=in_flight, staleness_exponent=staleness_exponent, seed=0)


def test_a_round_ends_when_the_buffer_is_full():
    buffer = make_buffer(size=2)
    assert buffer.set_out(1, range(4), lasting) == [0, 1, 2, 3]
    assert (list(buffer.arrive()), buffer.now) == ([0, 2], 2.0)
    assert buffer.set_out(2, range(4), lasting) == [0, 2]
    assert (list(buffer.arrive()), buffer.now) == ([0, 2], 4.0)
    buffer.set_out(3, range(4), lasting)  # 0 and 1 are there at 5, before 2 at 6
    assert ({c: f.round for c, f in buffer.arrive().items()}, buffer.now) == ({0: 3, 1: 1}, 5.0)


def test_who_arrives_makes_room_within_the_round():
    buffer = make_buffer(size=2, in_flight=2)
    started = buffer.set_out(1, range(4), lasting)
    assert len(started) == 3  # two at once, and one when the first was there
    assert len(buffer.arrive()) == 2


def test_no_more_than_in_flight_are_under_way():
    buffer, most = make_buffer(size=2, in_flight=3), 0
    for round in range(1, 30):
        buffer.set_out(round, range(4), lasting)
        buffer.arrive()
        most = max(most, len(buffer.flights))
    assert 1 <= most <= 3


def test_nobody_sets_out_who_may_not_or_is_under_way():
    buffer = make_buffer(size=1, in_flight=2)
    first = buffer.set_out(1, [1, 3], lasting)
    assert first == [1, 3]
    assert list(buffer.arrive()) == [1]
    assert buffer.set_out(2, [3], lasting) == []  # 3 is under way; 1 may not
    assert list(buffer.arrive()) == [3]
    assert buffer.set_out(3, [], lasting) == []
    assert buffer.arrive() == {}


def test_sizes_that_cannot_be_are_refused():
    for size in (0, 5):
        with pytest.raises(SettingError, match="buffer_size"):
            make_buffer(size=size)


def asynchronous(federation, tamper=None, *, size, in_flight=4, staleness_exponent=0.5, seconds=lasting, **settings):
    made = federation(tamper, kind=make_buffer(size, in_flight, staleness_exponent), **settings)
    made.grid.seconds = seconds
    return made


def test_a_full_buffer_of_equals_is_the_synchronous_round(federation):
    done = asynchronous(federation, size=4, seconds=lambda client, round: 1.0).run(2)
    np.testing.assert_allclose([m[0] for m in done.models], [0.0, 3.0, 4.0], rtol=1e-6)
    assert [report.simulated_seconds for report in done.reports[1:]] == [1.0, 2.0]


@pytest.mark.parametrize("inner", [FedAvg, FedMedian])
def test_late_updates_move_the_model_of_now_by_their_share(federation, inner):
    """Client 0 moves the model from 0 to 1; client 2, that set out from 0 as well, then adds its 3 over sqrt(2)."""
    done = asynchronous(federation, size=1, inner=inner(), max_rounds_per_client=1).run(2)
    assert [report.arrived for report in done.reports[1:]] == [{0: 0}, {2: 1}]
    assert [model[0] for model in done.models] == pytest.approx([0, 1, 1 + 3 / np.sqrt(2)])


def test_who_sets_out_again_has_the_model_of_now(federation):
    """Client 0 says 1, then 2; at 2 s client 2 is there too, and the smaller number is first."""
    done = asynchronous(federation, size=1).run(2)
    assert [report.arrived for report in done.reports[1:]] == [{0: 0}, {0: 0}]
    assert [model[0] for model in done.models] == [0, 1, 2]


def test_every_start_is_charged_before_it_is_asked_and_none_for_arriving(federation, ledger):
    charged = []

    def look(client, server_round, content):
        charged.append((client, ledger.rounds_by_client()[client]))
        return content

    done = asynchronous(federation, look, size=1).run(4)
    starts = [client for report in done.reports for client in report.asked]
    assert ledger.rounds_by_client() == {client: starts.count(client) for client in set(starts)}
    assert charged == [(c, starts[: i + 1].count(c)) for i, c in enumerate(starts)]


def test_a_client_that_fails_arrives_with_nothing(federation):
    def fail(client, server_round, content):
        if client == 0:
            raise RuntimeError("no battery")
        return content

    done = asynchronous(federation, fail, size=1, max_rounds_per_client=1).run(2)
    assert done.reports[1].arrived == {0: 0}
    assert done.reports[1].kept_model
    assert done.models[1][0] == 0.0
    assert done.reports[2].arrived == {2: 1}
    assert not done.reports[2].kept_model


def test_a_network_has_no_simulated_time(federation):
    made = asynchronous(federation, size=1)
    made.grid.seconds = None
    with pytest.raises(FederationError, match="buffer_size"):
        made.run(1)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("delay", {"delay": "none"}),
        ("buffer_size", {"buffer_size": 5}),
        ("buffer_size", {"secure_aggregation": True}),
        ("buffer_size", {"privacy_unit": "client", "dropout_rate": 0.0, "max_rounds_per_client": 0}),
        ("client_sampling", {"client_sampling": "poisson"}),
        ("max_rounds_per_client", {"max_rounds_per_client": 1}),
    ],
)
def test_what_does_not_go_together_is_refused(name, changes):
    with pytest.raises(SettingError, match=f"^{name}="):
        dataclasses.replace(CONFIG, **changes)


def test_a_strategy_that_needs_the_noise_is_refused(tmp_path):
    with pytest.raises(SettingError, match="buffer_size=2"):
        simulate(dataclasses.replace(CONFIG, strategy="kalman"), tmp_path / "run")


def lines(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def test_a_run_repeats_and_a_killed_one_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    simulate(CONFIG, tmp_path / "whole")
    save, calls = RunFolder.save_checkpoint, []

    def stop(self, checkpoint):
        save(self, checkpoint)
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        simulate(CONFIG, tmp_path / "cut")
    monkeypatch.undo()
    assert torch.load(tmp_path / "cut" / "checkpoint" / "model.pt")["server"]["strategy"]["buffer"]["flights"]
    resume(tmp_path / "cut")
    for name in ("rounds.jsonl",):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    models = [torch.load(tmp_path / run / "checkpoint" / "model.pt")["params"] for run in ("cut", "whole")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    with PrivacyLedger(tmp_path / "whole" / "ledger.sqlite", readonly=True) as ledger:
        starts = [client for line in lines(tmp_path / "whole") for client in line["asked"]]
        assert ledger.rounds_by_client() == {client: starts.count(client) for client in set(starts)}
    stale = [late for line in lines(tmp_path / "whole")[1:] for late in line["arrived"].values()]
    assert max(stale) > 0
