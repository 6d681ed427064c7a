"""check_accountant passes ours and outside ones, and catches each broken one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fed_dpsat.accounting import epsilon
from fed_dpsat.accounting.accountant import ACCOUNTANTS
from fed_dpsat.testing import check_accountant


def each(change):
    """Ours, given events that are changed before."""
    return lambda events, delta: epsilon([change(e) for e in events], delta)


def client_rate_times_batch_rate(event):
    """10 % of clients take part in a round, so every step is counted at a tenth of its rate."""
    return replace(event, sample_rate=0.1 * event.sample_rate)


def only_batches_that_are_not_empty(event):
    return replace(event, steps=max(1, math.ceil(event.steps * (1 - math.exp(-20 * event.sample_rate)))))


def reset_each_round(events, delta):
    """Flower's Opacus example: a new accountant in every round."""
    return epsilon(events[-1:], delta)


def mean_over_rounds(events, delta):
    return sum(epsilon([e], delta) for e in events) / max(len(events), 1)


def last_noise_counts_for_all(events, delta):
    steps = sum(e.steps for e in events)
    return epsilon([replace(events[-1], steps=steps)] if events else [], delta)


def finite_without_noise(events, delta):
    return epsilon([replace(e, noise_multiplier=max(e.noise_multiplier, 0.01)) for e in events], delta)


def central_limit(events, delta):
    """Gaussian DP's mu by the central limit, turned to epsilon roughly: an estimate, and not a bound."""
    if any(e.noise_multiplier == 0 for e in events):
        return math.inf
    mu = math.sqrt(sum(e.sample_rate**2 * e.steps * math.expm1(e.noise_multiplier**-2) for e in events))
    return mu * math.sqrt(2 * math.log(1.25 / delta)) * 0.8


BELOW_GAUSSIAN, BELOW_PLD = "gaussian_is_not_below_its_closed_form", "sampled_gaussian_is_not_below_pld"
BROKEN = {
    "reset each round (Flower's Opacus example)": (reset_each_round, {"rounds_add_up"}),
    "mean over rounds": (mean_over_rounds, {"rounds_add_up"}),
    "client rate times batch rate": (each(client_rate_times_batch_rate), {BELOW_GAUSSIAN}),
    "empty batches not counted": (each(only_batches_that_are_not_empty), {BELOW_PLD, "rounds_add_up"}),
    "1 % too low": (lambda e, d: epsilon(e, d) * 0.99, {BELOW_GAUSSIAN}),
    "the last noise for all": (last_noise_counts_for_all, {"no_noise_costs_infinity", "rounds_add_up"}),
    "finite without noise": (finite_without_noise, {"no_noise_costs_infinity"}),
    "an estimate": (central_limit, {BELOW_GAUSSIAN, BELOW_PLD}),
    "something for nothing": (lambda e, d: epsilon(e, d) + 0.1, {"no_events_cost_nothing"}),
    "delta ignored": (lambda e, d: epsilon(e, 1e-5), {"epsilon_grows_with_what_is_released"}),
    "always the worst": (lambda e, d: math.inf if e else 0.0, {"epsilon_grows_with_what_is_released"}),
    "a useless bound": (lambda e, d: 1000 * epsilon(e, d), {"epsilon_says_something"}),
}


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_every_shipped_accountant_conforms(accountant):
    assert len(check_accountant(lambda events, delta: epsilon(events, delta, accountant))) == 7


def test_an_outside_accountant_conforms():
    from dp_accounting.rdp import RdpAccountant

    def outside(events, delta):
        accountant = RdpAccountant(orders=range(2, 65))  # fractional orders are series that take seconds
        for event in events:
            accountant.compose(event.to_dp_event())
        return accountant.get_epsilon(delta) if events else 0.0

    check_accountant(outside)


@pytest.mark.by_default("1 % too low", "the last noise for all", "mean over rounds")
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_accountant_is_caught(case, caught):
    accountant, checks = BROKEN[case]
    assert caught(check_accountant, accountant) in checks
