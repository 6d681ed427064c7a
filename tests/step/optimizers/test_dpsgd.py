import math
from itertools import pairwise

import pytest
import torch

from fed_dpsat.errors import SettingError
from fed_dpsat.step.optimizers.dpsgd import DPSGD
from fed_dpsat.testing.problems import step_info

PARAMS = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}
GRADIENT = {"a": torch.tensor([10.0]), "b": torch.tensor([-20.0])}
ZEROS, ONES = ({name: torch.full((1,), value) for name in PARAMS} for value in (0.0, 1.0))


def steps(optimizer, count, params=PARAMS, gradient=GRADIENT, first=0):
    """Values of the two parameters after each of ``count`` steps along one gradient."""
    state = optimizer.init(params)
    for step in range(first, first + count):
        params, state = optimizer.update(params, gradient, state, step_info(step))
        yield [p.item() for p in params.values()]


def test_one_step_by_hand():
    assert next(steps(DPSGD(lr=0.125), 1)) == [1 - 1.25, 2 + 2.5]


def test_momentum_by_hand():
    """Slopes g, 1.5 g, 1.75 g."""
    assert list(steps(DPSGD(lr=1, momentum=0.5), 3)) == [[-9, 22], [-24, 52], [-41.5, 87]]


def test_weight_decay_by_hand():
    """Slopes 10 + 0.5 * 1 and -20 + 0.5 * 2."""
    assert next(steps(DPSGD(lr=1, weight_decay=0.5), 1)) == [-9.5, 21]


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("weight_decay", [0, 0.1])
def test_the_sgd_of_torch(momentum, weight_decay):
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(5, generator=generator, dtype=torch.float64)}
    leaf = params["w"].clone().requires_grad_()
    torch_sgd = torch.optim.SGD([leaf], lr=0.3, momentum=momentum, weight_decay=weight_decay)
    optimizer = DPSGD(lr=0.3, momentum=momentum, weight_decay=weight_decay)
    state = optimizer.init(params)
    for _ in range(20):
        gradient = torch.randn(5, generator=generator, dtype=torch.float64)
        params, state = optimizer.update(params, {"w": gradient}, state, step_info())
        leaf.grad = gradient.clone()
        torch_sgd.step()
    torch.testing.assert_close(params["w"], leaf.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [1, 1, 1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25, 0, 0]),
        ("cosine", [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0, 0]),
    ],
)
def test_a_schedule_by_hand(schedule, shares):
    """Six steps of a schedule that ends after four, gradient 1."""
    optimizer = DPSGD(lr=8, lr_schedule=schedule, total_steps=4)
    at = [0.0] + [a for a, _ in steps(optimizer, 6, ZEROS, ONES)]
    assert [b - a for a, b in pairwise(at)] == pytest.approx([-8 * s for s in shares], abs=1e-5)


def test_the_schedule_follows_the_federation():
    """A client first asked at step 3 of 4 has a quarter of the rate left, and none after that."""
    optimizer = DPSGD(lr=1, lr_schedule="linear", total_steps=4)
    assert list(steps(optimizer, 2, ZEROS, ONES, first=3)) == [[-0.25, -0.25], [-0.25, -0.25]]


def test_the_query_point_is_the_parameters():
    optimizer = DPSGD(lr=1, momentum=0.9)
    assert optimizer.query_point(PARAMS, optimizer.init(PARAMS), step_info()) is PARAMS


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("lr", -0.1, r"in \[0, inf\)"),
        ("lr", math.nan, r"in \[0, inf\)"),
        ("lr", math.inf, r"in \[0, inf\)"),
        ("momentum", 1, r"in \[0, 1\)"),
        ("momentum", -0.1, r"in \[0, 1\)"),
        ("momentum", math.nan, r"in \[0, 1\)"),
        ("weight_decay", -1, r"in \[0, inf\)"),
        ("weight_decay", math.nan, r"in \[0, inf\)"),
        ("lr_schedule", "step", "one of constant, linear, cosine"),
    ],
)
def test_settings_outside_their_bounds_are_refused(name, value, bound):
    with pytest.raises(SettingError, match=rf"^{name}=.* is not {bound}; "):
        DPSGD(**{"lr": 0.1, name: value})


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_needs_an_end(schedule):
    with pytest.raises(SettingError, match=r"total_steps=0 is not at least 1; the schedule needs an end"):
        DPSGD(lr=0.1, lr_schedule=schedule)


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("weight_decay", [0, 0.1])
def test_a_gradient_that_is_given_away_is_where_the_step_goes(momentum, weight_decay, same_bits):
    """Also where one is laid out or typed otherwise; those keep memory of their own."""
    params = {
        "w": torch.arange(6.0).reshape(3, 2),
        "turned": torch.ones(2, 3),
        "wide": torch.ones(2, dtype=torch.float64),
    }
    gradient = {"w": torch.ones(3, 2), "turned": torch.arange(6.0).reshape(3, 2).t(), "wide": torch.ones(2)}
    optimizer = DPSGD(lr=0.3, momentum=momentum, weight_decay=weight_decay)
    moved, after = optimizer.update(params, gradient, optimizer.init(params), step_info())
    given = {name: g.clone() for name, g in gradient.items()}
    owned, kept = optimizer.update_owned(params, given, optimizer.init(params), step_info())
    assert same_bits(moved, owned)
    assert all(same_bits(after[slot], kept[slot]) for slot in after)
    held = (kept["momentum"] if momentum else owned)["w"]
    assert held.data_ptr() == given["w"].data_ptr()
