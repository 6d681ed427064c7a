"""PrivateStrategy: charges before it sends, drops what is not valid by name, and leaves the rest to the inner one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg, FedMedian

from fed_dpsat.accounting import PrivacyEvent, epsilon
from fed_dpsat.flower.nodes import FederationError, FederationOver
from fed_dpsat.flower.wire import records

EVENT = PrivacyEvent(noise_multiplier=1.0, sample_rate=0.1, steps=2)


def test_fedavg_inside_is_the_mean_by_public_size(federation):
    done = federation().run(2)
    # client c says c + round with weight c + 1: sum (c+1)(c+r) / 10 = 2 + r
    np.testing.assert_allclose([m[0] for m in done.models], [0.0, 3.0, 4.0])


def test_another_strategy_inside_does_its_own_thing(federation):
    done = federation(inner=FedMedian()).run(1)
    np.testing.assert_allclose(done.models[1], [2.5, 2.5])  # of 1, 2, 3, 4


def test_every_client_asked_is_charged_once_per_round(federation, ledger):
    federation(cohort_size=2).run(3)
    assert sum(ledger.rounds_by_client().values()) == 6


def test_charges_are_made_before_a_client_is_asked(federation, ledger):
    charged = []

    def look(client, server_round, content):
        charged.append(ledger.rounds_by_client().get(client))
        return content

    federation(look).run(2)
    assert charged == [1] * 4 + [2] * 4


def test_a_failed_client_stays_charged(federation, ledger):
    def fail(client, server_round, content):
        if client == 1:
            raise RuntimeError("no battery")
        return content

    done = federation(fail).run(1)
    assert ledger.rounds_by_client()[1] == 1
    assert "no battery" in done.reports[1].dropped[1]


def replace_arrays(content, value):
    content[records.ARRAYS] = value
    return content


def without(content, key):
    del content[key]
    return content


BAD = {
    "NaN": lambda c: replace_arrays(c, records.to_arrays({"w": torch.tensor([1.0, float("nan")])})),
    "not torch": lambda c: replace_arrays(c, records.to_arrays({"w": torch.zeros(3)})),
    "dtype": lambda c: replace_arrays(c, records.to_arrays({"w": torch.zeros(2, dtype=torch.float64)})),
    "name": lambda c: replace_arrays(c, records.to_arrays({"v": torch.zeros(2)})),
    "lying header": lambda c: replace_arrays(
        c, ArrayRecord({"w": Array("float32", (2,), "numpy.ndarray", Array(np.zeros(9, np.float32)).data)})
    ),
    "no event": lambda c: without(c, records.EVENT),
    "no metrics": lambda c: without(c, records.METRICS),
    "more metrics": lambda c: c.update({records.METRICS: MetricRecord({"num-examples": 1, "loss": 0.1})}) or c,
    "negative size": lambda c: c.update({records.METRICS: MetricRecord({"num-examples": -1})}) or c,
    "less noise": lambda c: c[records.EVENT].update({"noise_multiplier": 0.5}) or c,
    "NaN noise": lambda c: c[records.EVENT].update({"noise_multiplier": float("nan")}) or c,
    "more steps": lambda c: c[records.EVENT].update({"steps": 3}) or c,
    "old round": lambda c: c[records.EVENT].update({"round": 7}) or c,
    "another client": lambda c: c[records.EVENT].update({"client": 0}) or c,
    "unknown partition": lambda c: c[records.EVENT].update({"client": 99}) or c,
    "second model": lambda c: c.update({"again": records.to_arrays({"w": torch.zeros(2)})}) or c,
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_reply_is_dropped_and_named_and_the_round_goes_on(federation, case):
    done = federation(lambda client, r, content: BAD[case](content) if client == 2 else content).run(1)
    assert list(done.reports[1].dropped) == [2]
    assert done.reports[1].accepted == [0, 1, 3]
    np.testing.assert_allclose(done.models[1], (1 * 1 + 2 * 2 + 4 * 4) / 7, rtol=1e-6)


def test_a_round_without_a_valid_reply_keeps_the_model_and_says_so(federation):
    done = federation(lambda client, r, content: BAD["NaN"](content) if r == 2 else content).run(3)
    assert [r.kept_model for r in done.reports[1:]] == [False, True, False]
    np.testing.assert_array_equal(done.models[1], done.models[2])


def fail_always(client, server_round, content):
    raise RuntimeError("broken")


def test_all_clients_failing_ends_the_run(federation):
    with pytest.raises(FederationError, match=r"every client that was asked failed.*broken"):
        federation(fail_always).run(5)


def test_a_small_failing_cohort_ends_the_run_at_the_third_round(federation, ledger):
    with pytest.raises(FederationError, match="3 round"):
        federation(fail_always, cohort_size=1).run(9)
    assert sum(ledger.rounds_by_client().values()) == 3


def test_replies_are_handed_over_in_the_order_of_clients(federation):
    seen = []

    class Watching(FedAvg):
        def aggregate_train(self, server_round, replies):
            seen.append([r.content[records.EVENT]["client"] for r in replies])
            return super().aggregate_train(server_round, replies)

    federation(inner=Watching()).run(3)
    assert seen == [[0, 1, 2, 3]] * 3


def test_a_duplicate_reply_counts_once(federation):
    done = federation()
    send = done.grid.send_and_receive
    done.grid.send_and_receive = lambda messages, **kw: [r for r in send(messages, **kw) for _ in range(2)]
    done.strategy.meet(done.grid)
    report = run_one_round(done)
    assert sorted(report.unexpected) == [f"client {c} replied again" for c in range(4)]
    assert report.accepted == [0, 1, 2, 3]


def run_one_round(done):
    arrays = records.to_arrays({"w": torch.zeros(2)})
    messages = done.strategy.configure_train(1, arrays, ConfigRecord(), done.grid)
    done.strategy.aggregate_train(1, done.grid.send_and_receive(messages))
    return done.strategy.report


def test_a_reply_from_a_node_nobody_knows_is_named(federation):
    done = federation()
    done.strategy.meet(done.grid)
    arrays = records.to_arrays({"w": torch.zeros(2)})
    messages = list(done.strategy.configure_train(1, arrays, ConfigRecord(), done.grid))
    replies = list(done.grid.send_and_receive(messages))
    replies[0].metadata.__dict__["_src_node_id"] = 4711
    done.strategy.aggregate_train(1, replies)
    assert done.strategy.report.unexpected == ["node 4711 is no known client"]
    assert list(done.strategy.report.dropped.values()) == ["no reply"]


def test_a_client_is_left_out_when_its_rounds_are_used_up(federation, ledger):
    federation(cohort_size=2, max_rounds_per_client=2).run(6)
    assert ledger.rounds_by_client() == dict.fromkeys(range(4), 2)  # then nobody is left to ask


def test_a_strategy_that_asks_a_node_twice_is_refused(federation):
    class Twice(FedAvg):
        def configure_train(self, *args):
            messages = list(super().configure_train(*args))
            return messages + messages[:1]

    with pytest.raises(FederationError, match="at most once"):
        federation(inner=Twice()).run(1)


class Returning(FedAvg):
    """Aggregates to what the test says."""

    def __init__(self, arrays):
        super().__init__()
        self.arrays = arrays

    def aggregate_train(self, server_round, replies):
        return self.arrays, None


def test_the_model_keeps_its_type_whatever_the_strategy_returns(federation):
    done = federation(inner=Returning(records.to_arrays({"w": torch.ones(2, dtype=torch.float64)}))).run(2)
    assert [m.dtype for m in done.models] == [np.float32] * 3


@pytest.mark.parametrize("arrays", [{"v": torch.ones(2)}, {"w": torch.ones(3)}, {"w": torch.full((2,), np.nan)}])
def test_a_strategy_that_returns_no_model_ends_the_run(federation, arrays):
    with pytest.raises(FederationError, match="Returning returned"):
        federation(inner=Returning(records.to_arrays(arrays))).run(1)


def test_a_client_without_budget_for_a_round_retires_for_good_and_the_run_ends_in_words(federation, ledger, make_plans):
    plans = make_plans()
    plans[3] = dataclasses.replace(plans[3], target_epsilon=epsilon([EVENT] * 2, 1e-5))
    done = federation(plans=plans).run(4)
    assert ledger.rounds_by_client() == {0: 4, 1: 4, 2: 4, 3: 2}
    assert done.strategy.retired == {3: 3}
    assert list(done.reports[3].retired) == [3]
    with pytest.raises(FederationOver, match="3 clients have budget left before round 1, fewer than min_clients=4"):
        federation(plans=plans, min_clients=4).run(4)


def test_a_client_that_joins_late_is_asked_from_then_on(federation, ledger, make_plans):
    plans = make_plans()
    plans[1] = dataclasses.replace(plans[1], first_round=3)
    federation(plans=plans).run(3)
    assert ledger.rounds_by_client() == {0: 3, 1: 1, 2: 3, 3: 3}


def test_each_client_is_told_and_charged_its_own_event(federation, ledger, make_plans):
    plans = make_plans()
    own = dataclasses.replace(EVENT, noise_multiplier=3.0)
    plans[2] = dataclasses.replace(plans[2], event=own)
    done = federation(
        lambda c, r, content: content[records.EVENT].update(own.to_dict()) or content if c == 2 else content,
        plans=plans,
    ).run(1)
    assert done.reports[1].accepted == [0, 1, 2, 3]
    assert ledger.history(2) == (own,)
    assert ledger.history(1) == (EVENT,)
