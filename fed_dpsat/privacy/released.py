"""Epsilon against someone who sees only the released global models, where taking part is random and secret.

One coin per ROUND: a client takes part with probability ``client_rate``, and then with all its ``local_steps``. With
(P, Q) the dominating pair of a composed round (example there, example not there), the pair of a round behind its coin
is ((1 - p) Q + p P, Q), and (Q, (1 - p) Q + p P) the other way round; rounds compose (Zhu, Dong and Wang 2022, whose
Theorem 11 keeps dominating pairs dominating). Multiplying p into the sample rate of every STEP is wrong: the steps of
a round share one coin.

The losses of a composed round come from ``pld`` and are moved to log((1 - p) + p exp(loss)), each split between two
points of a grid so that its mass under both measures stays (connect the dots), which never lowers epsilon.
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
    "tossed once a round and kept secret, the run's seed with it; and that the models do not show whether a client "
    "took part, which its other examples may: who can tell has the server's epsilon"
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
    behind_coin = _mixed(pld.composed(merge([event])), client_rate)
    return float(behind_coin.self_compose(rounds).get_epsilon_for_delta(delta))


def _mixed(one_round: PrivacyLossDistribution, client_rate: float) -> PrivacyLossDistribution:
    """The privacy loss distribution of one round behind its coin, from that of the round."""
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    losses, there, infinite = _read(one_round._pmf_remove)
    gone = there * np.exp(-losses)  # the same outcomes where the example is not there
    gone_alone = max(0.0, 1.0 - float(gone.sum()))  # outcomes that do not happen where it is
    remove = (
        np.append(np.log1p(client_rate * np.expm1(losses)), math.log1p(-client_rate)),
        np.append(client_rate * there + (1 - client_rate) * gone, (1 - client_rate) * gone_alone),
        client_rate * infinite,
    )
    losses, gone, gone_alone = _read(one_round._pmf_add)  # of the other direction: losses log(Q / P) under Q
    add = (
        np.append(-np.log1p(client_rate * np.expm1(-losses)), -math.log1p(-client_rate)),
        np.append(gone, gone_alone),
        0.0,
    )
    grid = _grid(*remove[:2])
    return PrivacyLossDistribution(_on_grid(*remove, grid), _on_grid(*add, grid))


def _read(pmf: DensePLDPmf) -> tuple[Losses, Losses, float]:
    """Losses, their probabilities, and the mass at infinity."""
    dense = pmf.to_dense_pmf()
    losses = (dense._lower_loss + np.arange(dense.size)) * dense._discretization
    keep = losses < 700.0  # beyond, exp overflows: taken as infinite, which is on the safe side
    beyond = float(dense._probs[~keep].sum())
    return losses[keep], np.asarray(dense._probs)[keep], float(dense._infinity_mass) + beyond


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
    """Zhu and Wang 2019, Theorem 6: RDP at ``order`` of any mechanism behind a Poisson coin, from its own RDP."""
    terms = [(order - 1) * math.log1p(-rate) + math.log1p((order - 1) * rate)]
    for k in range(2, order + 1):
        log_term = math.log(math.comb(order, k)) + (order - k) * math.log1p(-rate) + k * math.log(rate)
        terms.append(log_term + (k - 1) * whole[k] + (math.log(3) if k > 2 else 0.0))
    return float(np.logaddexp.reduce(terms)) / (order - 1)
