"""What a strategy has learned survives a checkpoint, and what cannot is named."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg

from fed_dpsat.flower.strategy_state import StrategyStateError, capture_state, restore_state
from fed_dpsat.flower.wire import records


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class Learned(FedAvg):
    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(0)
        self.inner = FedAdam()
        self.seen = {}


def test_everything_that_was_learned_comes_back():
    strategy = Learned()
    strategy.generator.random(7)
    strategy.inner.m_t = {"w": np.arange(3.0), "scale": np.float32(0.5)}
    strategy.seen = {3: (1, "two", None, b"x"), "sets": {1, 2}, "tensor": torch.ones(2)}
    strategy.model = records.to_arrays({"w": torch.arange(4.0)})
    strategy.record, strategy.settings = MetricRecord({"a": 0.5}), ConfigRecord({"b": ["c"]})
    fresh = Learned()
    restore_state(fresh, through_a_file(capture_state(strategy)))
    assert fresh.generator.random() == strategy.generator.random()
    np.testing.assert_array_equal(fresh.inner.m_t["w"], np.arange(3.0))
    assert type(fresh.inner.m_t["scale"]) is np.float32
    assert torch.equal(fresh.seen.pop("tensor"), torch.ones(2))
    assert fresh.seen == {3: (1, "two", None, b"x"), "sets": {1, 2}}
    assert (fresh.model, fresh.record, fresh.settings) == (strategy.model, strategy.record, strategy.settings)
    assert fresh.train_metrics_aggr_fn is strategy.train_metrics_aggr_fn


def test_what_was_captured_does_not_follow_the_strategy():
    strategy = FedAdam()
    strategy.m_t = {"w": np.zeros(2)}
    state = capture_state(strategy)
    strategy.m_t["w"] += 1
    fresh = FedAdam()
    restore_state(fresh, state)
    np.testing.assert_array_equal(fresh.m_t["w"], np.zeros(2))


def test_what_a_checkpoint_cannot_hold_is_named_with_a_remedy():
    strategy = FedAvg()
    strategy.history = {"seen": [object()]}
    with pytest.raises(StrategyStateError, match=r"FedAvg.history\['seen'\]\[...\] is a object.*state_dict\(\)"):
        capture_state(strategy)


def test_a_network_is_not_passed_over_because_it_can_be_called():
    strategy = FedAvg()
    strategy.critic = torch.nn.Linear(1, 1)
    with pytest.raises(StrategyStateError, match=r"FedAvg.critic is a Linear"):
        capture_state(strategy)


def test_a_strategy_may_say_itself_what_it_has_learned():
    class Own(FedAvg):
        def state_dict(self):
            return {"total": self.total}

        def load_state_dict(self, state):
            self.total = state["total"] + 1

    first, second = Own(), Own()
    first.total, first.unkept = 4, object()
    restore_state(second, through_a_file(capture_state(first)))
    assert second.total == 5
