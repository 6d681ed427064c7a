"""The audit in one run: canaries of the full weight, guesses that know nothing of the coins, and a bound that bites."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fed_dpsat.client.build import Experiment
from fed_dpsat.errors import SettingError
from fed_dpsat.lab.audit import canaries
from fed_dpsat.lab.audit.canaries import audit_one_run, canary_coordinates, canary_loss, one_process
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.clipping.automatic import AutomaticClipping
from fed_dpsat.step.clipping.global_ import GlobalClipping
from fed_dpsat.step.clipping.per_layer import PerLayerClipping
from fed_dpsat.step.gradients import loop
from fed_dpsat.step.gradients.per_example import ModelLoss, clipped_gradient_sum
from fed_dpsat.step.mechanism import GaussianMechanism

FAST = {"num_clients": 3, "num_rounds": 3, "delta": 1e-4, "target_epsilon": 1.0}


def test_the_bound_stays_below_the_ledger_and_a_loud_canary_is_heard():
    honest = audit_one_run(RunConfig(**FAST), canaries=300)
    assert not honest.broken
    assert honest.epsilon_ledger == pytest.approx(1.0, rel=0.01)
    assert (honest.canaries, honest.steps, honest.shares_tried) == (300, 3, 5)
    loud = audit_one_run(RunConfig(**{**FAST, "target_epsilon": 50.0}), canaries=300)
    assert 1 < loud.epsilon_lower < loud.epsilon_ledger


def test_a_run_without_the_noise_that_its_ledger_charges_is_found(monkeypatch):
    monkeypatch.setattr(GaussianMechanism, "_add_noise", lambda self, clipped_sum, generator: clipped_sum)
    result = audit_one_run(RunConfig(**FAST), canaries=300)
    assert result.broken
    assert result.correct > 0.8 * result.guesses


@pytest.mark.slow
def test_canaries_of_any_optimizer_and_rule():
    settings = {"optimizer": "dp-sat", "clipping": "per-layer", "model": "mlp", "momentum": 0.9, "target_epsilon": 50.0}
    result = audit_one_run(RunConfig(**{**FAST, **settings}), canaries=40)
    assert 0.5 < result.epsilon_lower < result.epsilon_ledger


@pytest.mark.slow
def test_mislabelled_images_stay_below_the_ledger():
    result = audit_one_run(RunConfig(**FAST), attack="mislabelled", canaries=100)
    assert not result.broken
    assert (result.attack, result.steps) == ("mislabelled", 3)


def test_guesses_about_noise_show_nothing():
    coins = np.random.default_rng(0).random(400) < 0.5
    guesses, correct = canaries._right(np.random.default_rng(1).random(400), coins, 200)
    assert guesses == 400
    assert 160 < correct < 240
    assert canaries._right(coins.astype(float), coins, 10) == (20, 20)


@pytest.mark.parametrize("rule", [FlatClipping, AutomaticClipping, GlobalClipping, PerLayerClipping])
def test_a_canary_adds_the_whole_bound_along_its_coordinates(rule):
    """For the gradient that the engine makes of it, whatever the rule."""
    clipping = rule(clip_norm=0.5)
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    params = {name: p.detach() for name, p in module.named_parameters()}
    found = canary_coordinates(params, clipping, 3, np.random.default_rng(0))
    assert found.shape == (3, 2 if rule is PerLayerClipping else 1)
    loss = canary_loss(ModelLoss(module), params, 3, found, canaries.slope_of(clipping, params, found))
    batch = torch.zeros(1, 4), torch.tensor([3 + 1])
    for engine in ("auto", "planned", "vmap"):
        total, _ = clipped_gradient_sum(loss, params, batch, clipping, engine=engine)
        flat = torch.cat([t.flatten() for t in total.values()])
        assert float(flat.norm()) == pytest.approx(0.5, abs=2e-3)
        assert set(torch.nonzero(flat).flatten().tolist()) == set(found[1].tolist())


def test_the_loss_of_ordinary_examples_stays_that_of_the_model():
    module = torch.nn.Linear(4, 3)
    params = {name: p.detach() for name, p in module.named_parameters()}
    inputs, targets = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 4])
    with_canaries = canary_loss(ModelLoss(module), params, 3, torch.tensor([[0], [7]]), 2.0)
    loss = with_canaries(params, inputs, targets)
    assert torch.equal(loss[:4], ModelLoss(module)(params, inputs[:4], targets[:4]))
    assert float(loss[4]) == pytest.approx(2 * float(params["weight"].flatten()[7]))


@pytest.mark.parametrize("rule", [FlatClipping, PerLayerClipping])
def test_the_default_engine_plans_for_canaries_among_examples(rule, monkeypatch):
    """Convolutions, norms and a head: there is no pass per example, and the sum is that of vmap."""

    def no_way_back(loss_fn, reason):
        raise AssertionError(reason)

    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(144, 3)
    )
    params, clipping = {name: p.detach() for name, p in module.named_parameters()}, rule(clip_norm=0.5)
    coordinates = canary_coordinates(params, clipping, 4, np.random.default_rng(0))
    loss = canary_loss(ModelLoss(module), params, 3, coordinates, 2.0)
    batch = torch.randn(7, 1, 8, 8), torch.tensor([0, 1, 2, 3, 4, 5, 6])
    monkeypatch.setattr(loop, "remember", no_way_back)
    expected, _ = clipped_gradient_sum(loss, params, batch, clipping, engine="vmap")
    found, _ = clipped_gradient_sum(loss, params, batch, clipping)
    for name, total in expected.items():
        torch.testing.assert_close(found[name], total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("canaries", {"canaries": 10**6}), ("canaries", {"canaries": 3}), ("attack", {"attack": "guess"})],
)
def test_audits_that_cannot_be(name, arguments):
    with pytest.raises(SettingError, match=name):
        audit_one_run(RunConfig(**FAST), **arguments)


def test_optimizers_whose_examples_no_canary_can_imitate():
    with pytest.raises(SettingError, match="saf"):
        audit_one_run(RunConfig(**FAST, optimizer="dp-sat", base_optimizer="saf"))


def test_a_clients_half_that_no_game_plays():
    with pytest.raises(SettingError, match="strategy='ditto' is not one of the server alone in an audit"):
        audit_one_run(RunConfig(**FAST, strategy="ditto"))


def test_more_mislabelled_canaries_than_test_images():
    with pytest.raises(SettingError, match="at most 360"):
        audit_one_run(RunConfig(**FAST), attack="mislabelled", canaries=361)


def test_the_run_that_is_audited_is_that_of_the_configuration_but_for_where_it_runs():
    config = RunConfig(**FAST, workers=2, stack_clients=3, profile=True)
    changed = {k for k, v in one_process(config).settings().items() if v != config.settings()[k]}
    assert changed == {"workers", "stack_clients", "profile"}
    assert Experiment.build(one_process(config)).named
