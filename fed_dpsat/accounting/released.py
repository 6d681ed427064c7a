"""Epsilon against someone who sees only the released global models, where taking part is random and secret.

One coin per ROUND: a client takes part with a chance q, and then with all its ``local_steps``. With (P, Q) the
dominating pair of a composed round (example there, example not there), the pair of a round behind its coin is
((1 - q) Q + q P, Q), and (Q, (1 - q) Q + q P) the other way round; rounds compose (Zhu, Dong and Wang 2022, by whom
dominating pairs stay dominating). Multiplying q into the sample rate of every STEP is wrong: the steps of a round share
one coin.

q is not the rate p of the coin, since the models tell of the coins. With n clients that toss, M ~ Binomial(n, p) take
part. An observer tells by each round's model in which set E of numbers M is: an empty round leaves the model as it was,
to the bit, and the level of the noise in a mean shows M more or less exactly. Given that, q = E[M | M in E] / n:

============================= =========================== ====================================================
the observer tells            E in a round of m > 0       q
============================= =========================== ====================================================
whether somebody took part    {1, ..., n}                 p / (1 - (1 - p) ** n)
how many took part            {m}                         m / n
less than that                any that holds m            at most ``chance_given(p, m, n)``
============================= =========================== ====================================================

The largest q over all E with m is of {m} and the numbers from some t on: with c the largest mean, a number above c that
is not in E would raise the mean, and one below c other than m lowers it. So n - m + 1 sets are tried. In an empty round
nobody takes part, and it costs nothing. Who takes part does not depend on any example, so the figure may be given for
the rounds as they fell.

The losses of a composed round come from ``pld`` and are moved to log((1 - q) + q exp(loss)), each split between two
points of a grid so that its mass under both measures stays (connect the dots), which never lowers epsilon.

What the pair assumes is in ``ASSUMPTIONS``. It takes a round in which the client takes part without the example for
one in which others take part; but its other examples move the model too. Caps and budgets that can bind make the number
of those who toss depend on earlier coins, and momentum or an ascent direction that a client carries into its next round
lets a later update tell of an earlier coin: there is no figure then.

========================== ===================================================================================
error of epsilon           size, measured (tests/accounting/test_released.py repeats a part)
========================== ===================================================================================
grid                       too high, by at most 1e-3 of epsilon where it is in [0.01, 100],
                           noise_multiplier >= 0.45 and q >= 1e-3; by 1 % where it is above 100
                           and by 1e-4 where it is below 0.01
double precision           FFT rounding can hide ``rounds * (steps + 1) * 2**-52`` of delta; that much is taken
                           off delta, and where it is over 1 % of delta the answer is RDP's, which is higher
many sizes of cohorts      more than ``MOST_CHANCES`` are rounded up to as many, which is higher
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
from fed_dpsat.accounting.accountant import epsilon, one_step_rdp
from fed_dpsat.accounting.event import PrivacyError, PrivacyEvent, merge

if TYPE_CHECKING:
    from dp_accounting.pld.pld_pmf import DensePLDPmf  # type: ignore[import-untyped]
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution  # type: ignore[import-untyped]

    Losses = NDArray[np.float64]
    Pair = tuple[Losses, Losses, float, Losses, float]
    """What ``_pair`` gives."""

ASSUMPTIONS = (
    "assumes that the observer sees the released models alone; that each client takes part by a coin of its own, "
    "tossed once a round and kept secret, the run's records with it, and its seed where that draws the coins; that a "
    "client carries no state (momentum, ascent direction) into its next round; and that the models show of a round "
    "how many took part, or a set of numbers that this is in, but not whether a client "
    "did, which its other examples or its size may: who can tell has the server's epsilon"
)
"""What the figure rests on; printed wherever it is printed."""

POINTS_PER_DEVIATION = 24
MAX_POINTS = 2**18
MOST_CHANCES = 16
"""Chances that are composed one by one: each costs a distribution of its own."""

Chances = Mapping[float, int]
"""The chance of a client to take part to the number of rounds that have it."""


class Cohort(NamedTuple):
    """A round: how many ``asked`` of those who ``tossed`` a coin."""

    asked: int
    tossed: int


def epsilon_of_models(
    event: PrivacyEvent, cohorts: Iterable[Cohort], coin: float, delta: float, accountant: str = "pld"
) -> float:
    """Epsilon at ``delta`` of rounds with these ``cohorts``, drawn by coins of chance ``coin``; 0 if all are empty.

    Against each observer who tells by the model of a round in which set its number of clients is, 0 by itself. Holds
    under ``ASSUMPTIONS`` only. Raises ``PrivacyError`` for a coin outside (0, 1].
    """
    if not 0 < coin <= 1:
        raise PrivacyError(f"coin={coin} is not in (0, 1]; it is clients_per_round / num_clients")
    held = Counter(cohort for cohort in cohorts if cohort.asked)
    if not held:
        return 0.0
    chances: Counter[float] = Counter()
    for (asked, tossed), rounds in held.items():
        chances[chance_given(coin, asked, tossed)] += rounds
    return epsilon_released(event, chances, delta, accountant)


def chance_given(coin: float, asked: int, tossed: int) -> float:
    """The largest chance of a client to be among ``asked`` of ``tossed`` for an observer who tells a set of numbers.

    The maximum of ``E[M | M in E] / tossed`` over sets E of numbers from 1 to ``tossed`` with ``asked`` in them, of M
    that is binomial.
    """
    if coin == 1 or asked == tossed:
        return 1.0
    number = np.arange(asked, tossed + 1)
    steps = np.log((tossed - number[:-1]) / (number[:-1] + 1)) + math.log(coin) - math.log1p(-coin)
    log_weight = np.concatenate([[0.0], np.cumsum(steps)])  # log(P(M = number) / P(M = asked))
    from_on = np.logaddexp.accumulate(log_weight[:0:-1])
    numbers_from_on = np.logaddexp.accumulate((log_weight + np.log(number))[:0:-1])
    means = np.exp(np.logaddexp(math.log(asked), numbers_from_on) - np.logaddexp(0.0, from_on))
    return min(1.0, max(asked, float(means.max())) / tossed)


def epsilon_released(event: PrivacyEvent, chances: Chances, delta: float, accountant: str = "pld") -> float:
    """Epsilon at ``delta`` of rounds in each of which ``event`` happens with its chance, by a coin that is secret.

    Never above what a server that sees every update has. RDP is exact where ``event`` is not sampled; else the bound of
    Zhu and Wang 2019 for any mechanism, at integer orders. Raises ``PrivacyError`` for a chance outside (0, 1] or no
    rounds.
    """
    for chance, rounds in chances.items():
        if not 0 < chance <= 1:
            raise PrivacyError(f"chance={chance} to take part is not in (0, 1]; leave rounds without any out")
        if rounds < 1:
            raise PrivacyError(f"rounds={rounds} is not at least 1; there is nothing to account for")
    if not chances:
        raise PrivacyError("chances={} is not at least one round; there is nothing to account for")
    server = epsilon([event] * sum(chances.values()), delta, accountant)
    if min(chances) == 1 or math.isinf(server):
        return server
    released = _epsilon_pld if accountant == "pld" else _epsilon_rdp
    return min(server, released(event, _fewer(chances), delta))


def _fewer(chances: Chances) -> Chances:
    """``MOST_CHANCES`` of them at most, each round at the next one up of those that are kept, which costs more."""
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
    lost = 2.0**-52 * compositions  # what FFT rounding can hide, as in ``pld``
    if lost > delta / 100:
        return _epsilon_rdp(event, chances, delta)
    one_round = pld.composed(merge([event]))
    pair = _pair(one_round)
    grid = _grid(pair, chances)
    behind_coins = [_mixed(pair, chance, grid).self_compose(count) for chance, count in chances.items()]
    return pld._epsilon_of(reduce(lambda one, other: one.compose(other), behind_coins), delta - lost)


def _mixed(pair: Pair, chance: float, grid: float) -> PrivacyLossDistribution:
    """The privacy loss distribution of one round behind its coin, from the pair of the round."""
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    _, _, there_alone, gone, gone_alone = pair
    losses, mixed = _behind_coin(pair, chance)
    if chance == 1:  # where the example is gone alone, the mixture has no mass either
        return PrivacyLossDistribution(
            _on_grid(losses, mixed, there_alone, grid), _on_grid(-losses, gone, gone_alone, grid)
        )
    gone = np.append(gone, gone_alone)
    return PrivacyLossDistribution(
        _on_grid(losses, mixed, chance * there_alone, grid), _on_grid(-losses, gone, 0.0, grid)
    )


def _behind_coin(pair: Pair, chance: float) -> tuple[Losses, Losses]:
    """Losses log(mixture / Q) of a round behind its coin, and the mixture's mass on them."""
    losses, there, _, gone, gone_alone = pair
    if chance == 1:
        return losses, there
    absent, present = math.log1p(-chance), math.log(chance)
    mixed = chance * np.append(there, 0.0) + (1 - chance) * np.append(gone, gone_alone)
    return np.append(np.logaddexp(absent, present + losses), absent), mixed


def _pair(one_round: PrivacyLossDistribution) -> Pair:
    """Losses log(P / Q), the mass of P on them and where Q has none, and so for Q.

    Both directions hold this one pair, with an absolute rounding error. So P is read where the loss is positive, Q
    where it is negative, and the other follows by a factor below 1: exp(53) would turn 1e-22 into everything.
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
    """One grid for all chances: fine for the mean variance of a round's loss, coarse enough for the widest."""
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
    """Each loss on its two neighbours of the grid, keeping its mass under both measures."""
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
    if event.sample_rate == 1:  # a composed round is one Gaussian, so the coin makes it a Poisson-sampled one
        together = event.noise_multiplier / math.sqrt(event.steps)
        total = sum(count * one_step_rdp(together, chance) for chance, count in chances.items())
        return float(compute_epsilon(all_orders, total, delta)[0])
    of_step = dict(zip(all_orders, one_step_rdp(event.noise_multiplier, event.sample_rate), strict=True))
    orders = [order for order in range(2, 64) if order in of_step]
    whole = {order: event.steps * float(of_step[order]) for order in orders}
    divergence = [sum(count * _sampled_rdp(o, chance, whole) for chance, count in chances.items()) for o in orders]
    return float(compute_epsilon(orders, divergence, delta)[0])


def _sampled_rdp(order: int, rate: float, whole: dict[int, float]) -> float:
    """RDP at ``order`` of any mechanism behind a Poisson coin, from its own RDP (Zhu and Wang 2019, general bound)."""
    if rate == 1:
        return whole[order]
    terms = [(order - 1) * math.log1p(-rate) + math.log1p((order - 1) * rate)]
    for k in range(2, order + 1):
        log_term = math.log(math.comb(order, k)) + (order - k) * math.log1p(-rate) + k * math.log(rate)
        terms.append(log_term + (k - 1) * whole[k] + (math.log(3) if k > 2 else 0.0))
    return float(np.logaddexp.reduce(terms)) / (order - 1)
