"""SAF against the paper, by hand and over 50 steps; its limits and what it stores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fed_dpsat.errors import SettingError
from fed_dpsat.step.gradients.loss import logits_of
from fed_dpsat.step.optimizers import DPSAT, DPSGD
from fed_dpsat.step.optimizers.base import ASCENT, BASE
from fed_dpsat.step.optimizers.saf import EPOCHS, MODELS, SAF, TrajectoryLoss, divergence
from fed_dpsat.testing.problems import step_info

RATE = 0.25
"""Four steps are an epoch."""


def saf(base=None, **settings):
    return SAF(base=base or DPSGD(lr=0.3), sample_rate=RATE, **settings)


def test_the_divergence_by_hand():
    """Logits (0, 0) then and (ln 3, 0) now: KL((1/2, 1/2) || (3/4, 1/4)) = ln(2/3)/2 + ln(2)/2, at temperature 1."""
    now = torch.tensor([[math.log(3.0), 0.0]])
    assert float(divergence(torch.zeros(1, 2), now, 1.0)) == pytest.approx(math.log(4 / 3) / 2)
    assert float(divergence(torch.zeros(1, 2), 5 * now, 5.0)) == pytest.approx(25 * math.log(4 / 3) / 2)
    assert float(divergence(now, now, 1.0)) == 0


@pytest.mark.parametrize(
    "packed", [lambda logits: logits, lambda logits: (logits, None), lambda logits: {"logits": logits}]
)
def test_by_hand(packed):
    """Two parameters are the logits; w = (ln 3, 0), w_old = 0, tau = 1, lambda = 2, class 0.

    The slope of the loss is p - (1, 0) = (-1/4, 1/4), and of the term p - p_old = (1/4, -1/4), twice.
    """

    class Logits:
        def __call__(self, params, inputs, targets):
            return self.criterion(self.outputs(params, inputs), targets)

        def outputs(self, params, inputs):
            return packed(params["w"].expand(len(inputs), 2))

        def criterion(self, outputs, targets):
            return torch.nn.functional.cross_entropy(logits_of(outputs), targets, reduction="none")

    w = torch.tensor([math.log(3.0), 0.0], requires_grad=True)
    loss = TrajectoryLoss(old={"w": torch.zeros(2)}, weight=2.0, temperature=1.0)(Logits())
    value = loss({"w": w}, torch.zeros(1, 1), torch.tensor([0]))
    (slope,) = torch.autograd.grad(value.sum(), w)
    assert value.item() == pytest.approx(math.log(4 / 3) + 2 * math.log(4 / 3) / 2)
    assert slope.tolist() == pytest.approx([0.25, -0.25])


def test_fifty_steps_of_the_paper(problem):
    """E = 2 epochs of 4 steps: in epoch e the term pulls towards the outputs at the first step of epoch e - 2."""
    weight, temperature, epochs = 0.7, 2.0, 2
    optimizer = saf(DPSGD(lr=problem.lr), saf_weight=weight, saf_temperature=temperature, saf_epochs=epochs)
    w, firsts, apart = problem.start, [], 0.0
    for step, ours in enumerate(problem.walk(optimizer)):
        epoch = step // 4
        if step % 4 == 0:
            firsts.append(w)

        def gradient(x, y, w=w, old=firsts[epoch - epochs] if epoch >= epochs else None):
            found = problem.gradient(w, x, y)
            if old is None:
                return found
            p, q = (problem.probabilities(at, x, temperature) for at in (old, w))
            return found + weight * temperature * np.outer(q - p, x)

        private = problem.private(step, gradient)
        plain = problem.private(step, lambda x, y, w=w: problem.gradient(w, x, y))
        w, apart = w - problem.lr * private, max(apart, float(np.abs(private - plain).max()))
        np.testing.assert_allclose(ours, w, rtol=1e-9, atol=1e-11)
    assert apart > 1e-4


def test_without_a_weight_it_is_its_base_and_stores_nothing(problem):
    base = DPSGD(lr=0.3, momentum=0.9)
    for ours, theirs in zip(problem.walk(saf(base, saf_weight=0)), problem.walk(base), strict=True):
        assert np.array_equal(ours, theirs)
    params = problem.params(problem.start)
    optimizer = saf(base, saf_weight=0)
    _, state = optimizer.update(params, params, optimizer.init(params), step_info())
    assert state.keys() == {BASE}


def test_in_the_first_epochs_it_is_its_base(problem):
    base = DPSGD(lr=0.3)
    pairs = list(zip(problem.walk(saf(base, saf_epochs=3)), problem.walk(base), strict=True))
    same = [np.array_equal(ours, theirs) for ours, theirs in pairs]
    assert same[:12] == [True] * 12
    assert not any(same[12:])


def test_it_stores_one_model_more_than_epochs(problem):
    optimizer = saf(saf_epochs=3)
    params = problem.params(problem.start)
    state = optimizer.init(params)
    for step in range(40):
        params, state = optimizer.update(params, params, state, step_info(step))
    assert len(state[MODELS]) == 4
    assert sorted(int(e) for e in state[EPOCHS].values()) == [6, 7, 8, 9]


def test_a_client_that_was_away_takes_the_newest_that_is_old_enough(problem):
    optimizer = saf(saf_epochs=2)
    params = problem.params(problem.start)
    _, state = optimizer.update(params, params, optimizer.init(params), step_info(0))
    assert optimizer.query_point(params, state, step_info(7)) is params
    assert optimizer.query_point(params, state, step_info(8)).loss is not None
    assert optimizer.query_point(params, state, step_info(400)).loss is not None


def test_dp_sat_over_saf_keeps_the_loss(problem):
    optimizer = DPSAT(base=saf(saf_epochs=1), rho=0.1)
    params = problem.params(problem.start)
    _, state = optimizer.update(params, params, optimizer.init(params), step_info(0))
    at = optimizer.query_point(params, state, step_info(4))
    assert at.loss is not None
    assert not torch.equal(at.points[0][1]["first"], params["first"])
    assert ASCENT in state


def test_a_loss_without_outputs_is_refused_in_words(problem, input_gradient):
    with pytest.raises(SettingError, match="optimizer='saf' is not for a loss without outputs; use ModelLoss"):
        TrajectoryLoss(old=problem.params(problem.start), weight=1.0, temperature=1.0)(input_gradient)


@pytest.mark.parametrize(
    ("name", "value"),
    [("saf_weight", -1), ("saf_weight", math.nan), ("saf_temperature", 0), ("saf_epochs", 0), ("sample_rate", 0)],
)
def test_what_is_out_of_bounds_is_refused(name, value):
    with pytest.raises(SettingError, match=f"^{name}="):
        SAF(**{"base": DPSGD(lr=1), "sample_rate": 0.5, name: value})


def test_old_weights_are_plain_tensors():
    """Outputs at them are computed from examples: a class of its own would be called with those."""

    class Own(torch.Tensor):
        pass

    with pytest.raises(SettingError, match="plain tensors"):
        TrajectoryLoss(old={"w": torch.zeros(2).as_subclass(Own)}, weight=1.0, temperature=1.0)
