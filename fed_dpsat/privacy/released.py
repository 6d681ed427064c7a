"""Epsilon against someone who sees only the released global models, where taking part is random and secret.

One coin per ROUND: a client takes part with probability ``client_rate``, and then with all its ``local_steps``. With
(P, Q) the dominating pair of a composed round (example there, example not there), the pair of a round behind its coin
is ((1 - p) Q + p P, Q), and (Q, (1 - p) Q + p P) the other way round; rounds compose (Zhu, Dong and Wang 2022, by
whom dominating pairs stay dominating). Multiplying p into the sample rate of every STEP is wrong: the steps of
a round share one coin.

The losses of a composed round come from ``pld`` and are moved to log((1 - p) + p exp(loss)), each split between two
points of a grid so that its mass under both measures stays (connect the dots), which never lowers epsilon.

What the pair assumes is in ``ASSUMPTIONS``. It takes a round in which the client takes part without the example for
one in which it does not take part; but its other examples move the model too. Caps and retirement only lower the
chance of a coin given all that was released before, which costs less. Momentum or an ascent direction that a client
carries into its next round does break the composition: a later update then tells of an earlier coin.

========================== ===================================================================================
error of epsilon           size, measured (tests/privacy/test_released.py repeats a part)
========================== ===================================================================================
grid                       too high, by at most 1e-3 of epsilon where it is in [0.01, 100],
                           noise_multiplier >= 0.45 and client_rate >= 1e-3; by 1 % where it is above 100
                           and by 1e-4 where it is below 0.01
double precision           FFT rounding can hide ``rounds * (steps + 1) * 2**-52`` of delta; that much is taken
                           off delta, and where it is over 1 % of delta the answer is RDP's, which is higher
========================== ===================================================================================
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fed_dpsat.privacy import pld
from fed_dpsat.privacy.accountant import epsilon, one_step_rdp
from fed_dpsat.privacy.event import PrivacyError, PrivacyEvent, merge

if TYPE_CHECKING:
    from dp_accounting.pld.pld_pmf import DensePLDPmf  # type: ignore[import-untyped]
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution  # type: ignore[import-untyped]

    Losses = NDArray[np.float64]

ASSUMPTIONS = (
    "assumes that the observer sees the released models alone; that each client takes part by a coin of its own, "
    "tossed once a round and kept secret, the run's seed and records with it; that a client carries no state "
    "(momentum, ascent direction) into its next round; and that the models do not show whether a client took part, "
    "which its other examples may: who can tell has the server's epsilon"
)
"""What the figure rests on; printed wherever it is printed."""

POINTS_PER_DEVIATION = 24
MAX_POINTS = 2**18


def epsilon_released(
    event: PrivacyEvent, rounds: int, client_rate: float, delta: float, accountant: str = "pld"
) -> float:
    """Epsilon at ``delta`` of ``rounds`` rounds, in each of which ``event`` happens with probability ``client_rate``.

    Holds under ``ASSUMPTIONS`` only, and is never above what a server that sees every update has. RDP is exact where
    ``event`` is not sampled; else the bound of Zhu and Wang 2019 for any mechanism, at integer orders. Raises
    ``PrivacyError`` for a rate outside (0, 1] or no rounds.
    """
    if not 0 < client_rate <= 1:
        raise PrivacyError(f"client_rate={client_rate} is not in (0, 1]; it is clients_per_round / num_clients")
    if rounds < 1:
        raise PrivacyError(f"rounds={rounds} is not at least 1; there is nothing to account for")
    server = epsilon([event] * rounds, delta, accountant)
    if client_rate == 1 or math.isinf(server):
        return server
    released = _epsilon_pld if accountant == "pld" else _epsilon_rdp
    return min(server, released(event, rounds, client_rate, delta))


def _epsilon_pld(event: PrivacyEvent, rounds: int, client_rate: float, delta: float) -> float:
    lost = 2.0**-52 * rounds * (event.steps + 1)  # what FFT rounding can hide, as in ``pld``
    if lost > delta / 100:
        return _epsilon_rdp(event, rounds, client_rate, delta)
    behind_coin = _mixed(pld.composed(merge([event])), client_rate)
    return pld._epsilon_of(behind_coin.self_compose(rounds), delta - lost)


def _mixed(one_round: PrivacyLossDistribution, client_rate: float) -> PrivacyLossDistribution:
    """The privacy loss distribution of one round behind its coin, from that of the round."""
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    losses, there, there_alone, gone, gone_alone = _pair(one_round)
    absent, present = math.log1p(-client_rate), math.log(client_rate)
    mixed_losses = np.append(np.logaddexp(absent, present + losses), absent)
    gone = np.append(gone, gone_alone)
    mixed = client_rate * np.append(there, 0.0) + (1 - client_rate) * gone
    grid = _grid(mixed_losses, mixed)
    return PrivacyLossDistribution(
        _on_grid(mixed_losses, mixed, client_rate * there_alone, grid), _on_grid(-mixed_losses, gone, 0.0, grid)
    )


def _pair(one_round: PrivacyLossDistribution) -> tuple[Losses, Losses, float, Losses, float]:
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


def _grid(losses: Losses, probabilities: Losses) -> float:
    mean = float(losses @ probabilities)
    deviation = math.sqrt(max(float(np.square(losses - mean) @ probabilities), 1e-16))
    fine = 2.0 ** math.floor(math.log2(deviation / POINTS_PER_DEVIATION))
    affordable = 2.0 ** math.ceil(math.log2((losses.max() - losses.min()) / MAX_POINTS))
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


def _epsilon_rdp(event: PrivacyEvent, rounds: int, client_rate: float, delta: float) -> float:
    from dp_accounting.rdp import RdpAccountant, compute_epsilon  # type: ignore[import-untyped]

    all_orders = RdpAccountant().orders
    if event.sample_rate == 1:  # a composed round is one Gaussian, so the coin makes it a Poisson-sampled one
        together = event.noise_multiplier / math.sqrt(event.steps)
        return float(compute_epsilon(all_orders, rounds * one_step_rdp(together, client_rate), delta)[0])
    of_step = dict(zip(all_orders, one_step_rdp(event.noise_multiplier, event.sample_rate), strict=True))
    orders = [order for order in range(2, 64) if order in of_step]
    whole = {order: event.steps * float(of_step[order]) for order in orders}
    divergence = [rounds * _sampled_rdp(order, client_rate, whole) for order in orders]
    return float(compute_epsilon(orders, divergence, delta)[0])


def _sampled_rdp(order: int, rate: float, whole: dict[int, float]) -> float:
    """RDP at ``order`` of any mechanism behind a Poisson coin, from its own RDP (Zhu and Wang 2019, general bound)."""
    terms = [(order - 1) * math.log1p(-rate) + math.log1p((order - 1) * rate)]
    for k in range(2, order + 1):
        log_term = math.log(math.comb(order, k)) + (order - k) * math.log1p(-rate) + k * math.log(rate)
        terms.append(log_term + (k - 1) * whole[k] + (math.log(3) if k > 2 else 0.0))
    return float(np.logaddexp.reduce(terms)) / (order - 1)
