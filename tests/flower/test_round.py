"""Kinds of rounds: each is charged before it sends and believes only the valid, and a new one is one class."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.serverapp.strategy import FedMedian

from fed_dpsat.flower.buffered import Buffer
from fed_dpsat.flower.round import RoundKind
from fed_dpsat.flower.wire import records


class TwoWaves(RoundKind):
    """Asks the odd clients first and the even ones when those have replied; a wave lasts a second."""

    def __init__(self):
        self.waves = 0

    def pass_time(self, lasting):
        self.now += 2.0

    def ask(self, round, grid, timeout):
        replies = []
        for first in (1, 0):
            messages = [m for client, m in round.messages.items() if client % 2 == first]
            replies += grid.send_and_receive(messages, timeout=timeout)
            self.waves += 1
        return replies

    def state_dict(self):
        return {**super().state_dict(), "waves": self.waves}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.waves = state["waves"]


def buffer():
    return Buffer(size=4, in_flight=4, staleness_exponent=0.5, seed=0)


def added_up(federation, tamper):
    return federation(tamper)


def one_by_one(federation, tamper):
    return federation(tamper, inner=FedMedian())


def buffered(federation, tamper):
    return federation(tamper, inner=FedMedian(), kind=buffer())


def of_ones_own(federation, tamper):
    return federation(tamper, inner=FedMedian(), kind=TwoWaves())


KINDS = [added_up, one_by_one, buffered, of_ones_own]


def run(made, rounds=1):
    made.grid.seconds = lambda client, round: 1.0
    return made.run(rounds)


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_is_asked_is_in_the_ledger(kind, federation, ledger):
    charged = []

    def look(client, server_round, content):
        charged.append(sum(ledger.rounds_by_client().values()))
        return content

    done = run(kind(federation, look), rounds=2)
    assert charged == [4] * 4 + [8] * 4
    assert done.reports[1].accepted == [0, 1, 2, 3]


def lie(client, server_round, content):
    if client == 3:
        content[records.EVENT].update({"steps": 1})
    return content


def fail(client, server_round, content):
    if client == 3:
        raise RuntimeError("no battery")
    return content


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_valid_is_used_no_more_than_what_never_came(kind, federation):
    lied, failed = run(kind(federation, lie)), run(kind(federation, fail))
    assert "is not the one that was charged" in lied.reports[1].dropped[3]
    np.testing.assert_array_equal(lied.models, failed.models)
    assert lied.models[1][0] == pytest.approx(14 / 6 if kind is added_up else 2.0)  # of 1, 2, 3


def test_a_new_kind_is_one_class(federation):
    done = run(of_ones_own(federation, None), rounds=3)
    assert [model[0] for model in done.models] == [0.0, 2.5, 3.5, 4.5]
    assert done.reports[3].simulated_seconds == 6.0
    state = done.strategy.state_dict()
    assert (state["simulated_seconds"], state["waves"]) == (6.0, 6)
    again = of_ones_own(federation, None).strategy
    again.load_state_dict(state, next_round=4, same_noise=True)
    assert (again.kind.now, again.kind.waves) == (6.0, 6)
