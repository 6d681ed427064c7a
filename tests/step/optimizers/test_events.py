"""What a step of each method costs: one poisson_gaussian event, and one release that the event is of."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.params import trainable
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.mechanism import GaussianMechanism

CONFIG = RunConfig(noise_multiplier=1.5, sample_rate=0.25, local_steps=3, num_rounds=4, lr=0.1)


CHAINS = {
    "dp-sat over disk": {"base_optimizer": "disk", "optimizer_args": "gamma = 0.5"},
    "dp-sat over random-freeze": {"base_optimizer": "random-freeze", "optimizer_args": "freeze_ramp = 0"},
    "dp-sat over disk over random-freeze over adam": {
        "base_optimizer": "disk+random-freeze+adam",
        "optimizer_args": "freeze_ramp = 0, kappa = 0.6",
    },
    "extrapolated over dplis": {"optimizer": "extrapolated", "base_optimizer": "dplis", "optimizer_args": "draws = 2"},
    "random-freeze over modelmix": {
        "optimizer": "random-freeze",
        "base_optimizer": "modelmix",
        "optimizer_args": "freeze_ramp = 0",
    },
    "zeroth-order over random-freeze": {
        "optimizer": "zeroth-order",
        "base_optimizer": "random-freeze",
        "optimizer_args": "freeze_ramp = 0",
    },
    "zeroth-order along 3": {"optimizer": "zeroth-order", "optimizer_args": "directions = 3"},
}


@pytest.mark.parametrize("name", ["dp-sgd", "disk", "dplis", "saf", "random-freeze", "zeroth-order", *CHAINS])
def test_one_event_and_one_release_a_step(name, monkeypatch):
    """Two rounds of three steps on the digits, by the names in the configuration."""
    released = []
    privatize = GaussianMechanism.privatize

    def counted(self, clipped_sum, generator):
        released.append(sum(t.numel() for t in clipped_sum.values()))
        return privatize(self, clipped_sum, generator)

    monkeypatch.setattr(GaussianMechanism, "privatize", counted)
    experiment = Experiment.build(dataclasses.replace(CONFIG, **CHAINS.get(name, {"optimizer": name})))
    params, state = trainable(experiment.loss_fn.module), None
    for round in (1, 2):
        assignment = Assignment(round=round, event=PrivacyEvent(noise_multiplier=1.5, sample_rate=0.25, steps=3))
        result = experiment.client_round(0, assignment, params, state)
        assert result.event == PrivacyEvent(noise_multiplier=1.5, sample_rate=0.25, steps=3, kind="poisson_gaussian")
        assert not torch.equal(result.params["1.weight"], params["1.weight"])
        params, state = result.params, result.state
    if name == "random-freeze":
        assert released == [650] * 3 + [650 - 227] * 3  # at rates 0 and 0.35
    elif "zeroth-order" in name:
        assert released == [3 if "3" in name else 1] * 6
    else:
        assert released == [650 - 455 if "random-freeze" in name else 650] * 6
