"""What a step of each method costs: one poisson_gaussian event, and one release that the event is of."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fed_dpsat.config import RunConfig
from fed_dpsat.experiment import Experiment, Task
from fed_dpsat.mechanism import GaussianMechanism
from fed_dpsat.optimizers import DPSAT, DPSGD
from fed_dpsat.optimizers.disk import DiSK
from fed_dpsat.optimizers.random_freeze import RandomFreeze
from fed_dpsat.params import trainable
from fed_dpsat.privacy.event import PrivacyEvent

CONFIG = RunConfig(noise_multiplier=1.5, sample_rate=0.25, local_steps=3, num_rounds=4, lr=0.1)


def freeze(base):
    return RandomFreeze(base=base, seed=0, steps_per_round=3, total_steps=12, freeze_ramp=0)


CHAINS = {
    "dp-sat over disk": DPSAT(base=DiSK(base=DPSGD(lr=0.1), gamma=0.5), rho=0.05),
    "dp-sat over random-freeze": DPSAT(base=freeze(DPSGD(lr=0.1)), rho=0.05),
    "dp-sat over disk over random-freeze": DPSAT(base=DiSK(base=freeze(DPSGD(lr=0.1))), rho=0.05),
}


@pytest.mark.parametrize("name", ["dp-sgd", "disk", "dplis", "saf", "random-freeze", "zeroth-order", *CHAINS])
def test_one_event_and_one_release_a_step(name, monkeypatch):
    """Two rounds of three steps on the digits, by the name in the configuration or as a chain of objects."""
    released = []
    privatize = GaussianMechanism.privatize

    def counted(self, clipped_sum, generator):
        released.append(sum(t.numel() for t in clipped_sum.values()))
        return privatize(self, clipped_sum, generator)

    monkeypatch.setattr(GaussianMechanism, "privatize", counted)
    config = CONFIG if name in CHAINS else dataclasses.replace(CONFIG, optimizer=name)
    experiment = Experiment.build(config, optimizer=CHAINS.get(name))
    params, state = trainable(experiment.loss_fn.module), None
    for round in (1, 2):
        task = Task(round=round, noise_multiplier=1.5, sample_rate=0.25, local_steps=3)
        result = experiment.client_round(0, task, params, state)
        assert result.event == PrivacyEvent(noise_multiplier=1.5, sample_rate=0.25, steps=3, kind="poisson_gaussian")
        assert not torch.equal(result.params["1.weight"], params["1.weight"])
        params, state = result.params, result.state
    sizes = {"zeroth-order": [1] * 6, "random-freeze": [650] * 3 + [650 - 227] * 3}  # at rates 0 and 0.35
    assert released == sizes.get(name, [650 - 455] * 6 if "random-freeze" in name else [650] * 6)
