"""check_strategy covers the client's half: each broken one fails the check that is about it."""

from __future__ import annotations

import pytest
import torch
from flwr.serverapp.strategy import FedAvg

from fed_dpsat.client.half import ClientHalf, Finished
from fed_dpsat.errors import SettingError
from fed_dpsat.testing import check_strategy, strategy
from fed_dpsat.testing.federation import Federation
from fed_dpsat.testing.half import HALF_CHECKS

REPLAYED, DECLARED = "half_is_replayed_from_private_gradients_alone", "half_sends_what_it_declares"
COUNT = []


class Kept(ClientHalf):
    def correct(self, model, private_gradient, params, received, state):
        last = state.get("last", private_gradient)
        return {name: g + 0.1 * last[name] for name, g in private_gradient.items()}

    def finish(self, received, trained, state):
        return Finished(params=trained[0].params, state={"last": trained[0].mean_gradient})


class KeepsInAGlobal(Kept):
    def correct(self, model, private_gradient, params, received, state):
        COUNT.append(None)
        return {name: g * (1 + len(COUNT) % 3) for name, g in private_gradient.items()}


class Draws(Kept):
    def correct(self, model, private_gradient, params, received, state):
        return {name: g + torch.randn_like(g) for name, g in private_gradient.items()}


class ChangesTheMessage(Kept):
    def finish(self, received, trained, state):
        return Finished(params={name: p.add_(1) for name, p in received.params.items()})


class SendsMore(Kept):
    def finish(self, received, trained, state):
        return Finished(params=trained[0].params, records={"extra": trained[0].params})


class SendsAnotherShape(Kept):
    def sends(self, params):
        return {"extra": params}

    def finish(self, received, trained, state):
        return Finished(params=trained[0].params, records={"extra": {n: p[:1] for n, p in trained[0].params.items()}})


class TakesAReservedName(Kept):
    def sends(self, params):
        return {"arrays": params}


class KeepsANumber(Kept):
    def finish(self, received, trained, state):
        return Finished(params=trained[0].params, state={"round": 1})


class DividesByTheNorm(Kept):
    def correct(self, model, private_gradient, params, received, state):
        return {name: g * torch.inf for name, g in private_gradient.items()}


class StartsTooOften(Kept):
    def start(self, received, state):
        return received.params, received.params


class OwnsAPart(Kept):
    def own_model(self, params, state):
        return dict(list(params.items())[:1])


class With(FedAvg):
    only_mean = False

    def __init__(self, half):
        super().__init__()
        self.client_half = half


@pytest.fixture
def halves(monkeypatch):
    """The checks of halves alone."""
    monkeypatch.setattr(strategy, "CHECKS", ())


def test_a_sound_half_passes(halves):
    assert check_strategy(lambda: With(Kept())) == [check.__name__ for check in HALF_CHECKS]


@pytest.mark.parametrize(
    ("half", "check"),
    [
        (KeepsInAGlobal, REPLAYED),
        (Draws, REPLAYED),
        (ChangesTheMessage, "half_changes_nothing_in_place"),
        (SendsMore, DECLARED),
        (SendsAnotherShape, DECLARED),
        (TakesAReservedName, DECLARED),
        (KeepsANumber, DECLARED),
        (DividesByTheNorm, DECLARED),
        (StartsTooOften, DECLARED),
        (OwnsAPart, "half_has_a_model_for_each_client"),
    ],
)
def test_each_broken_half_fails_its_check(half, check, halves, caught):
    assert caught(check_strategy, lambda: With(half())) == check


def test_an_attribute_keeps_nothing(halves):
    """Each call runs on a copy, so a counter on the half does not move."""

    class Counts(Kept):
        calls = 0

        def correct(self, model, private_gradient, params, received, state):
            self.calls += 1
            return {name: g * self.calls for name, g in private_gradient.items()}

    check_strategy(lambda: With(Counts()))


def test_records_and_a_strategy_of_the_mean_alone_exclude_each_other():
    class Means(With):
        only_mean = True

    with pytest.raises(SettingError, match="receives extra of single replies; leave only_mean unset"):
        Federation(Means(SendsAnotherShape()))


def test_a_reply_with_a_record_that_was_not_declared_is_invalid():
    def add(client, number, reply):
        if client == 0:
            reply["extra"] = reply["arrays"]
        return reply

    federation = Federation(FedAvg(), tamper=add)
    federation.round()
    assert federation.private.report.dropped.keys() == {0}
    assert "expected 'arrays' alone" in federation.private.report.dropped[0]
