import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fed_dpsat.errors import SettingError
from fed_dpsat.params import global_norm, subtract
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.gradients.per_example import clipped_gradient_sum
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.optimizers.base import ASCENT, BASE, climb
from fed_dpsat.step.optimizers.dpsat import DPSAT, DPSATMomentum
from fed_dpsat.step.optimizers.dpsgd import DPSGD
from fed_dpsat.testing.problems import step_info

METHODS = [DPSAT, DPSATMomentum]
PARAMS = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}
GRADIENT = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}


def values(params):
    return [p.item() for p in params.values()]


def random_gradients(count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield {name: torch.randn(1, generator=generator) for name in PARAMS}


@dataclass(frozen=True, kw_only=True)
class PerTensor(DPSAT):
    """Wrong: each tensor climbs by rho."""

    def query_point(self, params, state, info):
        return {n: climb({n: p}, {n: state[ASCENT][n]}, self.rho)[n] for n, p in params.items()}


def test_dpsat_by_hand():
    """g = (3, 4) of norm 5: the step goes to w - g / 4, the next query 10 further along g."""
    optimizer = DPSAT(base=DPSGD(lr=0.25), rho=10)
    state = optimizer.init(PARAMS)
    assert values(optimizer.query_point(PARAMS, state, step_info())) == [1, 2]
    params, state = optimizer.update(PARAMS, GRADIENT, state, step_info())
    assert values(params) == [0.25, 1]
    assert values(optimizer.query_point(params, state, step_info())) == [0.25 + 6, 1 + 8]


def test_dpsat_momentum_by_hand():
    """Slopes g = (3, 4), then g' + g / 2 = (8, 6): the second query climbs the step (2, 1.5), of norm 2.5."""
    optimizer = DPSATMomentum(base=DPSGD(lr=0.25, momentum=0.5), rho=10)
    state = optimizer.init(PARAMS)
    assert values(optimizer.query_point(PARAMS, state, step_info())) == [1, 2]
    params, state = optimizer.update(PARAMS, GRADIENT, state, step_info())
    assert values(optimizer.query_point(params, state, step_info())) == [0.25 + 6, 1 + 8]
    params, state = optimizer.update(params, {"a": torch.tensor([6.5]), "b": torch.tensor([4.0])}, state, step_info())
    assert values(params) == [0.25 - 2, 1 - 1.5]
    assert values(optimizer.query_point(params, state, step_info())) == [-1.75 + 8, -0.5 + 6]


def test_the_two_differ_where_momentum_does():
    queries = []
    for method in METHODS:
        optimizer = method(base=DPSGD(lr=0.25, momentum=0.9), rho=1)
        params, state = PARAMS, optimizer.init(PARAMS)
        for gradient in random_gradients(3):
            params, state = optimizer.update(params, gradient, state, step_info())
        queries.append(values(optimizer.query_point(params, state, step_info())))
    assert queries[0] != pytest.approx(queries[1], abs=1e-2)


def test_the_radius_is_over_all_parameters_together():
    for optimizer, climbed in (
        (DPSAT(base=DPSGD(lr=1), rho=10), [6, 8]),
        (PerTensor(base=DPSGD(lr=1), rho=10), [10, 10]),
    ):
        _, state = optimizer.update(PARAMS, GRADIENT, optimizer.init(PARAMS), step_info())
        assert values(subtract(optimizer.query_point(PARAMS, state, step_info()), PARAMS)) == climbed


@pytest.mark.parametrize("method", METHODS)
def test_the_step_is_that_of_its_base_at_the_unperturbed_parameters(method, same_bits):
    base = DPSGD(lr=0.1, momentum=0.9, weight_decay=0.1)
    optimizer = method(base=base, rho=100)
    ours, theirs = (PARAMS, optimizer.init(PARAMS)), (PARAMS, base.init(PARAMS))
    for gradient in random_gradients(5):
        ours, theirs = (
            optimizer.update(ours[0], gradient, ours[1], step_info()),
            base.update(theirs[0], gradient, theirs[1], step_info()),
        )
        assert same_bits(ours[0], theirs[0])
        assert same_bits(ours[1][BASE]["momentum"], theirs[1]["momentum"])


@pytest.mark.parametrize("method", METHODS)
def test_without_a_radius_it_queries_where_its_base_does(method, same_bits):
    optimizer = method(base=DPSGD(lr=0.1, momentum=0.9), rho=0)
    params, state = PARAMS, optimizer.init(PARAMS)
    for gradient in random_gradients(50):
        assert same_bits(optimizer.query_point(params, state, step_info()), params)
        params, state = optimizer.update(params, gradient, state, step_info())


@dataclass(frozen=True, kw_only=True)
class LookAhead(DPSGD):
    """A base that asks for its gradients elsewhere, as extrapolated SGD does."""

    def query_point(self, params, state, info):
        return {name: p - 1 for name, p in params.items()}


@pytest.mark.parametrize("method", METHODS)
def test_a_base_keeps_its_own_query_point(method, same_bits):
    optimizer = method(base=LookAhead(lr=0.1), rho=0)
    state = optimizer.init(PARAMS)
    assert same_bits(
        optimizer.query_point(PARAMS, state, step_info()), optimizer.base.query_point(PARAMS, state[BASE], step_info())
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_gradient_leaves_no_direction(method, same_bits):
    optimizer = method(base=DPSGD(lr=0.1), rho=0.03)
    zero = {name: torch.zeros(1) for name in PARAMS}
    params, state = optimizer.update(PARAMS, zero, optimizer.init(PARAMS), step_info())
    assert same_bits(optimizer.query_point(params, state, step_info()), PARAMS)


def test_momentum_without_a_step_leaves_no_direction(same_bits):
    optimizer = DPSATMomentum(base=DPSGD(lr=0), rho=0.03)
    params, state = optimizer.update(PARAMS, GRADIENT, optimizer.init(PARAMS), step_info())
    assert same_bits(optimizer.query_point(params, state, step_info()), PARAMS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rho", [-0.1, math.nan, math.inf])
def test_a_radius_outside_its_bounds_is_refused(method, rho):
    with pytest.raises(SettingError, match=r"^rho=.* is not in \[0, inf\); "):
        method(base=DPSGD(lr=1), rho=rho)


# With lr = 0 the weights must stay. The official code perturbs them once per physical batch and restores
# them once per logical one, so they drift (METHODS.md, mistake 1).

BATCH = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
MECHANISM = GaussianMechanism(noise_multiplier=0.1, clip_norm=1, expected_batch_size=8)
RHO, STEPS = 0.03, 12


def stay(input_gradient, physical_batch_size):
    optimizer = DPSAT(base=DPSGD(lr=0), rho=RHO)
    params, noise = {"w": torch.ones(20)}, np.random.default_rng(0)
    state = optimizer.init(params)
    for _ in range(STEPS):
        total, _ = clipped_gradient_sum(
            input_gradient,
            optimizer.query_point(params, state, step_info()),
            (BATCH, torch.zeros(8)),
            FlatClipping(clip_norm=1),
            physical_batch_size=physical_batch_size,
        )
        params, state = optimizer.update(params, MECHANISM.privatize(total, noise), state, step_info())
    return params


def drift(input_gradient, physical_batch_size):
    """Wrong: perturbs in place for every physical batch, takes it back after the last one."""
    params, noise, direction = {"w": torch.ones(20)}, np.random.default_rng(0), None
    for _ in range(STEPS):
        total = {"w": torch.zeros(20)}
        for rows in BATCH.split(physical_batch_size):
            perturbed = climb(params, direction, RHO)
            up = subtract(perturbed, params)
            params = perturbed
            chunk, _ = clipped_gradient_sum(
                input_gradient, params, (rows, torch.zeros(len(rows))), FlatClipping(clip_norm=1)
            )
            total["w"] += chunk["w"]
        params = subtract(params, up)
        direction = MECHANISM.privatize(total, noise)
    return params


@pytest.mark.parametrize("physical_batch_size", [1, 2, 3, 4, 8, 100])
def test_the_weights_stay_whatever_the_physical_batch(physical_batch_size, input_gradient, same_bits):
    assert same_bits(stay(input_gradient, physical_batch_size), {"w": torch.ones(20)})


@pytest.mark.parametrize(("physical_batch_size", "batches"), [(4, 2), (2, 4)])
def test_the_official_loop_drifts_and_would_be_noticed(physical_batch_size, batches, input_gradient):
    away = float(global_norm(subtract(drift(input_gradient, physical_batch_size), {"w": torch.ones(20)})))
    assert 0.1 < away <= (STEPS - 1) * (batches - 1) * RHO + 1e-5
    whole = float(global_norm(subtract(drift(input_gradient, 8), {"w": torch.ones(20)})))
    assert whole < 1e-5
