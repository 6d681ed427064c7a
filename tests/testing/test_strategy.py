"""check_strategy passes stock strategies and catches each broken one; shipped ones are in tests/strategies."""

from __future__ import annotations

import random

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import strategy as stock
from flwr.serverapp.strategy import FedAvg

from fed_dpsat.accounting import PrivacyLedger
from fed_dpsat.testing import check_strategy
from fed_dpsat.testing.federation import Federation, start, still


class Combining(FedAvg):
    """The model after a round as ``combine(replies, sizes)``, array by array, of models or of updates."""

    def configure_train(self, server_round, arrays, config, grid):
        self.before = {name: a.numpy() for name, a in arrays.items()}
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        contents = [r.content for r in replies]
        sizes = np.array([c["metrics"]["num-examples"] for c in contents], dtype=float)
        models = [{name: a.numpy() for name, a in c["arrays"].items()} for c in contents]
        after = self.combined(models, sizes / sizes.sum())
        return ArrayRecord({name: Array(np.asarray(a)) for name, a in after.items()}), None

    def combined(self, models, weights):
        return {name: self.combine(name, [m[name] for m in models], weights) for name in self.before}

    def combine(self, name, values, weights):
        return sum(w * v for w, v in zip(weights, values, strict=True))

    def update(self, models, weights):
        mean = {name: Combining.combine(self, name, [m[name] for m in models], weights) for name in self.before}
        return {name: mean[name] - before for name, before in self.before.items()}


class FirstWins(Combining):
    def combine(self, name, values, weights):
        return values[0]


class SumsUpdates(Combining):
    def combine(self, name, values, weights):
        return self.before[name] + sum(v - self.before[name] for v in values)


class DividesByTheCohort(Combining):
    """Counts replies that never came."""

    def combine(self, name, values, weights):
        return sum(values) / 8


class StepsBack(Combining):
    def combine(self, name, values, weights):
        return 2 * self.before[name] - super().combine(name, values, weights)


class ScalesByTheNorm(Combining):
    """Clips the mean update to C by C / |update|: the zero update too."""

    def combined(self, models, weights):
        update = self.update(models, weights)
        norm = np.sqrt(sum(np.square(u).sum() for u in update.values()))
        return {name: b + update[name] * (0.1 / norm) for name, b in self.before.items()}


class Flattens(Combining):
    def combine(self, name, values, weights):
        return np.atleast_1d(super().combine(name, values, weights))


class LosesAnArray(Combining):
    def combined(self, models, weights):
        after = super().combined(models, weights)
        del after["count"]
        return after


class DrawsWithoutASeed(Combining):
    def combine(self, name, values, weights):
        return super().combine(name, values, weights) * (1 + 1e-3 * random.random())


class Momentum(Combining):
    """Right: the momentum is in the object."""

    def __init__(self):
        super().__init__()
        self.slope = {}

    def combined(self, models, weights):
        update = self.update(models, weights)
        self.slope = {name: u + 0.9 * self.slope.get(name, 0) for name, u in update.items()}
        return {name: b + self.slope[name] for name, b in self.before.items()}


class MomentumIsStored(Momentum):
    """Right again: it says what its state is."""

    def state_dict(self):
        return {"slope": self.slope}

    def load_state_dict(self, state):
        self.slope = state["slope"]


class MomentumIsNotStored(MomentumIsStored):
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class MomentumIsShared(Momentum):
    """The momentum is in the class."""

    kept = {}  # noqa: RUF012

    def combined(self, models, weights):
        self.slope = MomentumIsShared.kept
        after = super().combined(models, weights)
        MomentumIsShared.kept = self.slope
        return after


class CoolsDownByAnIterator(Combining):
    """Its steps shrink by an iterator, which starts again in a resumed run."""

    def __init__(self):
        super().__init__()
        self.rates = iter([1.0, 0.5, 0.25, 0.125] * 25)

    def combined(self, models, weights):
        rate, update = next(self.rates), self.update(models, weights)
        return {name: b + rate * update[name] for name, b in self.before.items()}


class SaysItNeedsTheMean(Combining):
    """A median that claims to be a function of the mean."""

    only_mean = True

    def combine(self, name, values, weights):
        return np.median(np.stack(values), axis=0)


class NeedsTheMean(Combining):
    """Right."""

    only_mean = True


class NeedsManyReplies(Combining):
    def combine(self, name, values, weights):
        return np.sort(np.stack(values), axis=0)[1:-1].mean(0)


class AsksBehindTheLedger(Combining):
    """Asks every client once more, through the grid."""

    def configure_train(self, server_round, arrays, config, grid):
        content = RecordDict({"arrays": arrays, "config": config})
        grid.send_and_receive([Message(content, node, MessageType.TRAIN) for node in grid.get_node_ids()])
        return super().configure_train(server_round, arrays, config, grid)


class AsksTwice(Combining):
    def configure_train(self, *args):
        messages = list(super().configure_train(*args))
        return messages + messages[:1]


CHARGES, SHAPES, WEIGHTS = (
    "charges_are_exactly_for_what_was_asked",
    "model_keeps_names_shapes_and_types",
    "weights_are_not_negative_and_sum_to_one",
)
BROKEN = {
    FirstWins: "reply_order_changes_nothing",
    SumsUpdates: WEIGHTS,
    DividesByTheCohort: WEIGHTS,
    StepsBack: "equal_replies_move_that_way",
    ScalesByTheNorm: "zero_update_stays_finite",
    Flattens: SHAPES,
    LosesAnArray: SHAPES,
    DrawsWithoutASeed: "new_strategies_agree",
    MomentumIsNotStored: "state_survives_checkpoint_and_resume",
    MomentumIsShared: "new_strategies_agree",
    CoolsDownByAnIterator: "state_survives_checkpoint_and_resume",
    SaysItNeedsTheMean: "only_mean_is_true",
    NeedsManyReplies: "empty_rounds_keep_the_model",
    AsksBehindTheLedger: CHARGES,
    AsksTwice: SHAPES,
}


STOCK = {
    "FedAvg": stock.FedAvg,
    "FedAvgM": lambda: stock.FedAvgM(server_momentum=0.9),
    "FedAdagrad": stock.FedAdagrad,
    "FedAdam": stock.FedAdam,
    "FedYogi": stock.FedYogi,
    "FedProx": lambda: stock.FedProx(proximal_mu=0.1),
    "FedMedian": stock.FedMedian,
    "FedTrimmedAvg": stock.FedTrimmedAvg,
    "Krum": lambda: stock.Krum(num_malicious_nodes=1),
    "MultiKrum": lambda: stock.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=5),
    "Bulyan": lambda: stock.Bulyan(num_malicious_nodes=1),
}


@pytest.mark.by_default("FedAvg", "FedMedian")
@pytest.mark.parametrize("name", STOCK)
def test_stock_strategies_conform(name):
    check_strategy(STOCK[name], averaging=name in ("FedAvg", "FedProx"))


@pytest.mark.by_default("Combining", "MomentumIsStored")
@pytest.mark.parametrize("factory", [Combining, Momentum, MomentumIsStored, NeedsTheMean])
def test_what_the_broken_ones_are_made_of_conforms(factory):
    check_strategy(factory, averaging=factory in (Combining, NeedsTheMean))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("factory", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_strategy_is_caught(factory, caught):
    assert caught(check_strategy, factory, averaging=True) == BROKEN[factory]


def test_a_wrapper_that_lets_bad_replies_through_is_caught(caught, monkeypatch):
    monkeypatch.setattr("fed_dpsat.flower.wire.records.check_arrays", lambda *_: None)
    assert caught(check_strategy, FedAvg) == "bad_replies_do_not_spread"


def test_a_wrapper_that_charges_one_client_too_few_is_caught(caught, monkeypatch):
    charge = PrivacyLedger.charge_many

    def forget(ledger, number, attempt, events):
        charge(ledger, number, attempt, events)
        ledger.rounds_by_client = lambda: {c: n for c, n in PrivacyLedger.rounds_by_client(ledger).items() if c}

    monkeypatch.setattr(PrivacyLedger, "charge_many", forget)
    assert caught(check_strategy, FedAvg) == CHARGES


def test_a_whole_number_that_all_clients_send_stays():
    federation = Federation(FedAvg(), move=still, model={**start(), "count": np.array(17)})
    assert federation.round()["count"] == 17
