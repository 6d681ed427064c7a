"""Epsilon against an observer who sees only the released global models, if participation is random and secret.

One coin per ROUND: a client takes part with probability q, and then with all its ``local_steps``. Let (P, Q) be the
dominating pair of a composed round (with the example, without it). The pair of a round with its coin is
((1 - q) Q + q P, Q), and (Q, (1 - q) Q + q P) in the other direction. Rounds compose (Zhu, Dong and Wang 2022: a
composition of dominating pairs is dominating). Multiplying the sample rate of every STEP by q is wrong, because the
steps of a round share one coin.

q is not the sampling rate p of the clients, because a released model carries information about the coins. Of n
eligible clients, M ~ Binomial(n, p) take part. The observer learns from the model of a round that M is in a set E: an
empty round leaves the model unchanged to the bit, and the level of the noise in a mean shows M with some precision.
Given this, q = E[M | M in E] / n:

============================= =========================== ====================================================
the observer learns           E in a round of m > 0       q
============================= =========================== ====================================================
whether any client took part  {1, ..., n}                 p / (1 - (1 - p) ** n)
how many clients took part    {m}                         m / n
less than that                any set that contains m     at most ``chance_given(p, m, n)``
============================= =========================== ====================================================

The largest q over all E that contain m has E = {m} and all numbers from some t on: let c be the largest mean; a number
above c outside E would raise the mean, and a number below c other than m lowers it. So the search tries n - m + 1 sets.
An empty round costs nothing. Participation does not depend on any example, so epsilon may use the numbers of the
rounds that took place.

The losses of a composed round come from ``pld`` and move to log((1 - q) + q exp(loss)). Each loss is split between two
grid points so that its mass under both measures stays (connect the dots), which never lowers epsilon.

``ASSUMPTIONS`` lists the assumptions. The pair replaces a round in which the client takes part without the example by a
round in which other clients take part; but the other examples of the client move the model too. There is no epsilon in
two cases. Caps and budgets that can bind make the number of eligible clients depend on earlier coins. Momentum or an
ascent direction that a client carries into its next round lets a later update reveal an earlier coin.

========================== ===================================================================================
error of epsilon           size, measured (tests/accounting/test_released.py repeats a part)
========================== ===================================================================================
grid                       too high, by at most 1e-3 of epsilon if epsilon is in [0.01, 100],
                           noise_multiplier >= 0.45 and q >= 1e-3; by 1 % if epsilon is above 100,
                           by 1e-4 if epsilon is below 0.01
double precision           FFT rounding can hide ``rounds * (steps + 1) * 2**-52`` of delta; delta is lowered by
                           this amount; for an amount over 1 % of delta the result is the larger bound of RDP
many sizes of cohorts      more than ``MOST_CHANCES`` are rounded up to as many, which raises epsilon
========================== ===================================================================================
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fed_dpsat.accounting import pld
from fed_dpsat.accounting.accountant import epsilon, has_rdp, one_step_rdp, step_rdp
from fed_dpsat.accounting.event import PrivacyError, PrivacyEvent, merge

if TYPE_CHECKING:
    from dp_accounting.pld.pld_pmf import DensePLDPmf  # type: ignore[import-untyped]
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution  # type: ignore[import-untyped]

    Losses = NDArray[np.float64]
    Pair = tuple[Losses, Losses, float, Losses, float]
    """The result of ``_pair``."""

ASSUMPTIONS = (
    "assumes that the observer sees only the released models; that each client takes part by a coin of its own, "
    "tossed once a round; that the coins, the records of the run and the seed of the coins stay secret; that a "
    "client carries no state (momentum, ascent direction) into its next round; and that the models of a round reveal "
    "at most the number of clients that took part, but not whether a given client did. Its other examples or its size "
    "can reveal that; against an observer who detects it, the epsilon of the server holds"
)
"""The assumptions of ``epsilon_of_models``, printed with its result."""

POINTS_PER_DEVIATION = 24
MAX_POINTS = 2**18
MOST_CHANCES = 16
"""Largest number of distinct chances in a composition: each needs a distribution of its own."""

Chances = Mapping[float, int]
"""Number of rounds by the chance of a client to take part in the round."""


class Cohort(NamedTuple):
    """A round: ``asked`` clients take part, out of ``tossed`` clients with a coin."""

    asked: int
    tossed: int


def epsilon_of_models(
    event: PrivacyEvent, cohorts: Iterable[Cohort], client_rate: float, delta: float, accountant: str = "pld"
) -> float:
    """Epsilon at ``delta`` of rounds with these ``cohorts``, sampled at ``client_rate``; 0 if all are empty.

    It holds under ``ASSUMPTIONS`` only, against an observer who learns from the model of a round a set that contains
    the number of clients; the number 0 is a set of its own. Raises ``PrivacyError`` for a rate outside (0, 1].
    """
    if not 0 < client_rate <= 1:
        raise PrivacyError(f"client_rate={client_rate} is not in (0, 1]; it is clients_per_round / num_clients")
    held = Counter(cohort for cohort in cohorts if cohort.asked)
    if not held:
        return 0.0
    chances: Counter[float] = Counter()
    for (asked, tossed), rounds in held.items():
        chances[chance_given(client_rate, asked, tossed)] += rounds
    return epsilon_released(event, chances, delta, accountant)


def chance_given(client_rate: float, asked: int, tossed: int) -> float:
    """The largest chance of a client to be among ``asked`` of ``tossed``, for an observer who learns a set of numbers.

    The maximum of ``E[M | M in E] / tossed`` for a binomial M, over all sets E of numbers from 1 to ``tossed`` that
    contain ``asked``.
    """
    if client_rate == 1 or asked == tossed:
        return 1.0
    number = np.arange(asked, tossed + 1)
    steps = np.log((tossed - number[:-1]) / (number[:-1] + 1)) + math.log(client_rate) - math.log1p(-client_rate)
    log_weight = np.concatenate([[0.0], np.cumsum(steps)])  # log(P(M = number) / P(M = asked))
    from_on = np.logaddexp.accumulate(log_weight[:0:-1])
    numbers_from_on = np.logaddexp.accumulate((log_weight + np.log(number))[:0:-1])
    means = np.exp(np.logaddexp(math.log(asked), numbers_from_on) - np.logaddexp(0.0, from_on))
    return min(1.0, max(asked, float(means.max())) / tossed)


def epsilon_released(event: PrivacyEvent, chances: Chances, delta: float, accountant: str = "pld") -> float:
    """Epsilon at ``delta`` of rounds in which ``event`` happens with the chance of the round, by a secret coin.

    It is at most the epsilon against a server that sees every update. RDP is exact if ``event`` is Gaussian and not
    sampled; else it is the bound of Zhu and Wang 2019 for any mechanism, at integer orders. Raises ``PrivacyError`` for
    a chance outside (0, 1], and without rounds.
    """
    for chance, rounds in chances.items():
        if not 0 < chance <= 1:
            raise PrivacyError(f"chance={chance} to take part is not in (0, 1]; leave out rounds without clients")
        if rounds < 1:
            raise PrivacyError(f"rounds={rounds} is not at least 1; leave out a chance without rounds")
    if not chances:
        raise PrivacyError("chances={} is not at least one round; give the rounds of the run")
    server = epsilon([event] * sum(chances.values()), delta, accountant)
    if min(chances) == 1 or math.isinf(server):
        return server
    released = _epsilon_pld if accountant == "pld" else _epsilon_rdp
    return min(server, released(event, _fewer(chances), delta))


def _fewer(chances: Chances) -> Chances:
    """At most ``MOST_CHANCES`` chances; each round moves up to the next kept chance, which costs more."""
    ordered = sorted(chances)
    if len(ordered) <= MOST_CHANCES:
        return chances
    kept = [ordered[-1 - i * len(ordered) // MOST_CHANCES] for i in range(MOST_CHANCES)][::-1]
    found: Counter[float] = Counter()
    for chance, rounds in chances.items():
        found[kept[bisect_left(kept, chance)]] += rounds
    return found


def _epsilon_pld(event: PrivacyEvent, chances: Chances, delta: float) -> float:
    rounds = sum(chances.values())
    compositions = rounds * (event.steps + 1) + len(chances) - 1
    lost = 2.0**-52 * compositions  # FFT rounding can hide this part of delta, as in ``pld``
    if lost > delta / 100:
        return _epsilon_rdp(event, chances, delta) if has_rdp([event]) else math.inf
    one_round = pld.composed(merge([event]))
    pair = _pair(one_round)
    grid = _grid(pair, chances)
    behind_coins = [_mixed(pair, chance, grid).self_compose(count) for chance, count in chances.items()]
    return pld._epsilon_of(reduce(lambda one, other: one.compose(other), behind_coins), delta - lost)


def _mixed(pair: Pair, chance: float, grid: float) -> PrivacyLossDistribution:
    """The privacy loss distribution of one round with its coin, from the pair of the round."""
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    _, _, there_alone, gone, gone_alone = pair
    losses, mixed = _behind_coin(pair, chance)
    if chance == 1:  # the mixture is P, so mass of Q outside the support of P is an infinite loss
        return PrivacyLossDistribution(
            _on_grid(losses, mixed, there_alone, grid), _on_grid(-losses, gone, gone_alone, grid)
        )
    gone = np.append(gone, gone_alone)
    return PrivacyLossDistribution(
        _on_grid(losses, mixed, chance * there_alone, grid), _on_grid(-losses, gone, 0.0, grid)
    )


def _behind_coin(pair: Pair, chance: float) -> tuple[Losses, Losses]:
    """Losses log(mixture / Q) of a round with its coin, and the mass of the mixture on them."""
    losses, there, _, gone, gone_alone = pair
    if chance == 1:
        return losses, there
    absent, present = math.log1p(-chance), math.log(chance)
    mixed = chance * np.append(there, 0.0) + (1 - chance) * np.append(gone, gone_alone)
    return np.append(np.logaddexp(absent, present + losses), absent), mixed


def _pair(one_round: PrivacyLossDistribution) -> Pair:
    """Losses log(P / Q), the mass of P on them and outside the support of Q, and the same two for Q.

    The two directions store this pair with an absolute rounding error. So this function reads P at positive losses and
    Q at negative ones, and computes the other by a factor below 1: exp(53) would turn an error of 1e-22 into 1.
    """
    of_p, of_q = one_round._pmf_remove.to_dense_pmf(), one_round._pmf_add.to_dense_pmf()
    loss_p, loss_q = (pmf._discretization * (pmf._lower_loss + np.arange(pmf.size)) for pmf in (of_p, of_q))
    positive, negative = loss_p > 0, loss_q >= 0
    p, q = np.maximum(of_p._probs[positive], 0.0), np.maximum(of_q._probs[negative], 0.0)
    losses = np.append(-loss_q[negative], loss_p[positive])
    there = np.append(q * np.exp(-loss_q[negative]), p)
    gone = np.append(q, p * np.exp(-loss_p[positive]))
    return losses, there, float(of_p._infinity_mass), gone, float(of_q._infinity_mass)


def _grid(pair: Pair, chances: Chances) -> float:
    """One grid for all chances: fine enough for the mean variance of the losses, coarse enough for the widest."""
    variance = widest = 0.0
    for chance, count in chances.items():
        losses, mixed = _behind_coin(pair, chance)
        mean = float(losses @ mixed)
        variance += count * float(np.square(losses - mean) @ mixed)
        widest = max(widest, float(losses.max() - losses.min()))
    deviation = math.sqrt(max(variance / sum(chances.values()), 1e-16))
    fine = 2.0 ** math.floor(math.log2(deviation / POINTS_PER_DEVIATION))
    affordable = 2.0 ** math.ceil(math.log2(widest / MAX_POINTS))
    return max(fine, affordable)


def _on_grid(losses: Losses, probabilities: Losses, infinite: float, grid: float) -> DensePLDPmf:
    """Split each loss between its two neighbours on the grid; its mass under both measures stays."""
    from dp_accounting.pld.pld_pmf import DensePLDPmf

    below = np.floor(losses / grid)
    share_above = np.expm1(below * grid - losses) / math.expm1(-grid)
    lowest = int(below.min())
    index = (below - lowest).astype(np.int64)
    on_grid = np.bincount(index, probabilities * (1 - share_above), minlength=int(index.max()) + 2)
    on_grid += np.bincount(index + 1, probabilities * share_above, minlength=on_grid.size)
    return DensePLDPmf(grid, lowest, on_grid, infinite, True)


def _epsilon_rdp(event: PrivacyEvent, chances: Chances, delta: float) -> float:
    from dp_accounting.rdp import RdpAccountant, compute_epsilon  # type: ignore[import-untyped]

    all_orders = RdpAccountant().orders
    if event.sample_rate == 1 and not event.is_laplace:  # one Gaussian a round, Poisson-sampled by the coin
        together = event.noise_multiplier / math.sqrt(event.steps)
        total = sum(count * one_step_rdp(together, chance) for chance, count in chances.items())
        return float(compute_epsilon(all_orders, total, delta)[0])
    of_step = dict(zip(all_orders, step_rdp(event), strict=True))
    orders = [order for order in range(2, 64) if order in of_step]
    whole = {order: event.steps * float(of_step[order]) for order in orders}
    divergence = [sum(count * _sampled_rdp(o, chance, whole) for chance, count in chances.items()) for o in orders]
    return float(compute_epsilon(orders, divergence, delta)[0])


def _sampled_rdp(order: int, rate: float, whole: dict[int, float]) -> float:
    """RDP at ``order`` of a Poisson-sampled mechanism, from the RDP of the mechanism (Zhu and Wang 2019)."""
    if rate == 1:
        return whole[order]
    terms = [(order - 1) * math.log1p(-rate) + math.log1p((order - 1) * rate)]
    for k in range(2, order + 1):
        log_term = math.log(math.comb(order, k)) + (order - k) * math.log1p(-rate) + k * math.log(rate)
        terms.append(log_term + (k - 1) * whole[k] + (math.log(3) if k > 2 else 0.0))
    return float(np.logaddexp.reduce(terms)) / (order - 1)
