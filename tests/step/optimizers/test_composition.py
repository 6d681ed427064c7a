"""Every method over every other, as a line of a configuration, in the loop of a run: it trains, or says why not."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from fed_dpsat import plugins
from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.train import Request
from fed_dpsat.client.trial import try_client
from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.errors import InputError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate
from fed_dpsat.step.optimizers.adam import Adam
from fed_dpsat.step.optimizers.base import BASE
from fed_dpsat.step.optimizers.chain import build_optimizer
from fed_dpsat.step.optimizers.disk import FILTERED, VARIANCE, DiSK
from fed_dpsat.testing import check_optimizer
from fed_dpsat.testing.problems import step_info

NAMES = list(plugins.builtin("optimizer"))
OUTER = [n for n in NAMES if "base" in plugins.parameters("optimizer", n, plugins.load("optimizer", n))]
CHAINS = {
    "dp-sat": [
        "dp-sat-momentum",
        "disk",
        "random-freeze",
        "adam",
        "disk+adam",
        "random-freeze+adam",
        "disk+random-freeze+adam",
        "dplis+saf",
    ],
    "disk": ["adam", "random-freeze"],
    "extrapolated": ["adam", "disk+random-freeze"],
    "modelmix": ["dp-sat+disk+adam"],
    "dp-sam": ["adam"],
    "zeroth-order": ["adam"],
}
ASKED = [(outer, base) for outer, bases in CHAINS.items() for base in bases]
SPACE = "possible around a base whose private gradient is of"
REFUSED = {
    **{(name, name): f"names '{name}' twice; name it once" for name in OUTER},
    ("dp-sam", "sam"): "is not one that steps in each call",
    ("sam", "dp-sam"): "is not one that steps in each call",
    **{(name, "zeroth-order"): SPACE for name in (
        "dp-sat", "dp-sat-momentum", "dp-sam", "sam", "extrapolated", "disk", "dplis", "random-freeze",
    )},
}  # fmt: skip


def tiny():
    generator = torch.Generator().manual_seed(0)
    examples = Examples(
        inputs=torch.randn(40, 1, 2, 2, generator=generator),
        labels=torch.randint(3, (40,), generator=generator),
        mean=(0.0,),
        std=(1.0,),
    )
    return Dataset(name="tiny", train=examples, test=examples, class_names=("a", "b", "c"))


DATA = tiny()


def config(optimizer, base, **changes):
    """Private, but with SAM in the chain; frozen from the first round on, where a rate can be given."""
    names = [optimizer, *base.split("+")]
    noise = 0.0 if "sam" in names else 1.0
    return RunConfig(
        optimizer=optimizer, base_optimizer=base, noise_multiplier=noise, private=noise > 0, num_clients=2,
        local_steps=2, sample_rate=0.5, lr=0.1, rho=0.05, momentum=0.5, weight_decay=0.01,
        optimizer_args="freeze_ramp = 0.0" if "random-freeze" in names else "", **changes,
    )  # fmt: skip


def trains(settings, rounds):
    """So many rounds of one client: finite, moved, and at the event that the assignment is charged for."""
    experiment = Experiment.build(settings, dataset=DATA)
    params, state = experiment.trained(1), None
    for round in range(1, rounds + 1):
        assignment = Assignment(
            round=round, event=PrivacyEvent(noise_multiplier=settings.noise_multiplier, sample_rate=0.5, steps=2)
        )
        result = experiment.client_round(0, assignment, params, state)
        assert result.event == assignment.event
        assert result.event.steps == 2
        assert all(bool(p.isfinite().all()) for p in result.params.values())
        assert any(not torch.equal(p, params[name]) for name, p in result.params.items())
        params, state = result.params, result.state


@pytest.mark.parametrize(("outer", "base"), REFUSED)
def test_what_makes_no_sense_is_refused_before_anything_is_charged(outer, base):
    with pytest.raises(InputError, match=REFUSED[outer, base]):
        try_client(Experiment.build(config(outer, base), dataset=DATA))


@pytest.mark.parametrize(("outer", "base"), ASKED)
def test_a_chain_trains(outer, base):
    trains(config(outer, base), rounds=2)


@pytest.mark.slow
@pytest.mark.parametrize("outer", OUTER)
def test_all_others_train(outer):
    for base in NAMES:
        if (outer, base) not in REFUSED:
            trains(config(outer, base), rounds=1)


def settings_of(outer, base, lr):
    run = config(outer, base)
    return {**run.settings(), "lr": lr, "total_steps": 50, "steps_per_round": 4}, run.optimizer_args


@pytest.mark.slow
@pytest.mark.parametrize(
    ("outer", "base"),
    [("dp-sat", "disk+adam"), ("dp-sat", "random-freeze"), ("extrapolated", "adam"), ("dp-sam", "adam")],
)
def test_a_chain_conforms(outer, base):
    def made(lr):
        settings, arguments = settings_of(outer, base, lr)
        return build_optimizer(outer, base, settings, arguments)

    check_optimizer(lambda: made(0.1), zero_lr=None if "modelmix" in (outer, base) else lambda: made(0.0))


def test_clients_of_a_chain_train_together_as_they_do_alone():
    settings = config("dp-sat", "disk+adam", stack_clients=2)
    experiment = Experiment.build(settings, dataset=DATA)
    params = experiment.trained(1)
    assignment = Assignment(round=1, event=PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=2))
    requests = [Request(client=c, assignment=assignment, params=params, state=None) for c in range(2)]
    for request, result in zip(requests, experiment.client_rounds(requests), strict=True):
        alone = experiment.client_round(**vars(request))
        assert alone.state.keys() == result.state.keys()
        for name, p in alone.params.items():
            torch.testing.assert_close(result.params[name], p, rtol=1e-4, atol=1e-5)


def test_adam_under_disk_is_told_the_noise_that_the_filter_leaves():
    """Of noise alone, 4000 coordinates: the variance of m, by hand (1 - kappa)^2 of the last and kappa^2 of the new."""
    optimizer = DiSK(base=Adam(lr=0.0), kappa=0.25)
    params, generator = {"w": torch.zeros(4000)}, torch.Generator().manual_seed(0)
    state, variance, told = optimizer.init(params), 0.0, 0.0
    for _ in range(6):
        gradient = {"w": 2 * torch.randn(4000, generator=generator)}
        params, state = optimizer.update(params, gradient, state, step_info(noise_std=2.0))
        variance = 0.75**2 * variance + 0.25**2 * 4
        assert float(state[VARIANCE]) == pytest.approx(variance)
        assert float(state[BASE]["count"]["noise"]) == pytest.approx(told := 0.999 * told + 0.001 * variance)
        assert float(state[FILTERED]["w"].var()) == pytest.approx(variance, rel=0.1)


def test_every_pair_is_in_the_table():
    """A new method is over and under all others without a line here, unless it cannot be."""
    assert set(REFUSED) <= set(itertools.product(OUTER, NAMES))
    assert len(NAMES) >= 13
    assert set(NAMES) - set(OUTER) == {"adam", "dp-sgd"}


def test_a_run_with_a_frozen_body_sends_active_coordinates_of_the_head(tmp_path):
    """Random freeze over the head alone: 0.7 of 15 coordinates are frozen, 5 are sent, and keep the others' bits."""
    run = config("dp-sat", "random-freeze")
    run = dataclasses.replace(run, train_layers="head", model="mlp", num_rounds=2, momentum=0.0)
    experiment = Experiment.build(run, dataset=DATA)
    assert sum(p.numel() for p in experiment.trained(1).values()) == 128 * 3 + 3
    subspace = experiment.subspace(1)
    assert subspace.size(387) == 387 - 270
    summary = simulate(run, tmp_path / "run", dataset=DATA)
    assert summary["trained_parameters"] == 387
