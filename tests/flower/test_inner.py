"""A strategy inside ours: what it overrules is said, nonsense is refused, what it learned survives a checkpoint."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord
from flwr.serverapp import strategy as flowers
from flwr.serverapp.strategy import FedAdam, FedAvg, Strategy

from fed_dpsat import RunConfig, simulate
from fed_dpsat.errors import SettingError
from fed_dpsat.flower.inner import StrategyStateError, capture_state, restore_state, say_overruled
from fed_dpsat.flower.wire import records

CONFIG = RunConfig(num_clients=4, num_rounds=1, noise_multiplier=1.0, delta=1e-4)


class Around(Strategy):
    """Somebody's strategy around another one."""

    def __init__(self, inside):
        self.inside = inside

    def configure_train(self, *args):
        return self.inside.configure_train(*args)

    def aggregate_train(self, *args):
        return self.inside.aggregate_train(*args)

    def configure_evaluate(self, *args):
        return []

    def aggregate_evaluate(self, *args):
        return None

    def summary(self):
        pass


WRAPPERS = {
    "DifferentialPrivacyClientSideFixedClipping": ((1.0, 1.0, 4), "no client clips its change for it"),
    "DifferentialPrivacyClientSideAdaptiveClipping": ((0.1, 4), "no client clips its change for it"),
    "DifferentialPrivacyServerSideFixedClipping": ((1.0, 1.0, 4), "numpy's global generator"),
    "DifferentialPrivacyServerSideAdaptiveClipping": ((0.1, 4), "numpy's global generator"),
}


@pytest.mark.parametrize("around", [lambda s: s, Around])
@pytest.mark.parametrize("name", WRAPPERS)
def test_flowers_privacy_is_refused_with_the_reason_before_anything(tmp_path, name, around):
    arguments, reason = WRAPPERS[name]
    wrapper = getattr(flowers, name)(FedAdam(), *arguments)
    with pytest.raises(SettingError, match=rf"{name}.*{reason}.*give FedAdam itself.*privacy_unit=client") as raised:
        simulate(CONFIG, tmp_path / "run", strategy=around(wrapper))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_every_privacy_wrapper_of_this_flower_is_among_them():
    assert set(WRAPPERS) == {name for name in dir(flowers) if name.startswith("DifferentialPrivacy")}


SAID = {
    "a fraction": (FedAvg(fraction_train=0.3), {}, "fraction_train=0.3 of FedAvg has no effect: clients_per_round=0"),
    "a minimum": (FedAdam(min_available_nodes=3), {}, "min_available_nodes=3 of FedAdam has no effect"),
    "evaluation": (FedAvg(fraction_evaluate=0.5), {}, "fraction_evaluate=0.5 of FedAvg has no effect"),
    "inside": (Around(FedAvg(fraction_train=0.3)), {}, "fraction_train=0.3 of Around has no effect"),
    "another fraction": (FedAvg(fraction_train=0.3), {"clients_per_round": 2}, "fraction_train=0.3"),
    "metrics of evaluation": (FedAvg(evaluate_metrics_aggr_fn=print), {}, "evaluate_metrics_aggr_fn=<built-in"),
    "by name": (
        "fedavg",
        {"strategy": "flwr.serverapp.strategy:FedAvg", "strategy_args": "fraction_train = 0.3"},
        "0.3",
    ),
}
NOT_SAID = {
    "defaults": (FedAvg(), {}),
    "what is so": (FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1), {}),
    "the fraction of the run": (FedAvg(fraction_train=0.5), {"clients_per_round": 2}),
    "the minimum of the run": (FedAvg(min_available_nodes=3), {"min_clients": 3}),
}


@pytest.mark.by_default("a minimum", "evaluation", "another fraction")
@pytest.mark.parametrize("case", SAID)
def test_what_is_overruled_is_said_once_in_one_line(tmp_path, caplog, case):
    strategy, changes, said = SAID[case]
    objects = {"strategy": strategy} if isinstance(strategy, Strategy) else {}
    simulate(dataclasses.replace(CONFIG, **changes), tmp_path / "run", **objects)
    told = [record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()]
    assert len(told) == 1
    assert said in told[0]
    assert "\n" not in told[0]


@pytest.mark.parametrize("case", NOT_SAID)
def test_what_is_not_overruled_is_not_said(caplog, case):
    strategy, changes = NOT_SAID[case]
    say_overruled(strategy, dataclasses.replace(CONFIG, **changes))
    assert "has no effect" not in caplog.text


def test_a_strategy_inside_another_asks_the_whole_cohort_too(tmp_path):
    """It asked a third of the cohort, drawn from no seed, and waited for a second node in a cohort of one."""
    asked = []
    config = dataclasses.replace(CONFIG, clients_per_round=1, num_rounds=2)
    simulate(config, tmp_path / "one", strategy=Around(FedAvg()), on_round=lambda r: asked.append(r["asked"]))
    config = dataclasses.replace(CONFIG, num_rounds=1)
    inside = Around(FedAvg(fraction_train=0.3))
    simulate(config, tmp_path / "all", strategy=inside, on_round=lambda r: asked.append(r["asked"]))
    assert [len(clients) for clients in asked] == [0, 1, 1, 0, 4]


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
