"""Calibration: the noise multiplier for a target epsilon, and a table of epsilon over rounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fed_dpsat.accounting.accountant import epsilon, has_rdp
from fed_dpsat.accounting.event import History, PrivacyError, PrivacyEvent

LEAST, MOST = 0.01, 1e4  # range of noise multipliers in the search
TOLERANCE = 1.001
FIRST_DISTANCE = 0.05  # in the logarithm of the noise multiplier; the search doubles it


@dataclass(frozen=True, kw_only=True)
class EpsilonRow:
    """Epsilon of a schedule after ``rounds`` rounds, at one delta; ``epsilon_rdp`` is None if RDP has no bound."""

    rounds: int
    epsilon_pld: float
    epsilon_rdp: float | None


def noise_multiplier_for(
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: str = "pld",
    kind: str = "poisson_gaussian",
    paid: History = (),
) -> float:
    """Smallest noise multiplier at which ``steps`` steps of an event of ``kind`` cost at most ``target_epsilon``.

    The target is of the steps and of what was ``paid`` together.
    By dp_accounting's calibration. The result is at most 0.1 % too large and never too small: its epsilon is at most
    the target. Raises ``PrivacyError`` for a result above 10,000 or below 0.01, and for a target that is not positive
    and finite.
    """
    if isinstance(target_epsilon, bool) or not 0 < target_epsilon < math.inf:
        raise PrivacyError(
            f"target_epsilon={target_epsilon} is not in (0, inf); for no privacy, set noise_multiplier=0"
        )

    from dp_accounting import mechanism_calibration as search  # type: ignore[import-untyped]

    def event(noise_multiplier: float) -> PrivacyEvent:
        within = min(max(noise_multiplier, LEAST), MOST)
        return PrivacyEvent(noise_multiplier=within, sample_rate=sample_rate, steps=steps, kind=kind)

    if paid and (spent := epsilon(paid, delta, accountant)) >= target_epsilon:
        raise PrivacyError(
            f"target_epsilon={target_epsilon} is not above {spent:.4g}, which other releases cost; raise it, or lower "
            "statistics_epsilon or evaluation_budget"
        )
    epsilon([event(MOST)], delta, accountant)  # raises for an invalid argument before the search starts
    guess = _guess(target_epsilon, delta, sample_rate, steps)
    more = epsilon([*paid, event(guess)], delta, accountant) > target_epsilon

    def at(distance: float) -> PrivacyEvent:
        """From the guess towards the target, in logarithms: dp_accounting looks to one side, at absolute distances."""
        return event(guess * math.exp(min(distance, 50.0) * (1 if more else -1)))

    try:
        bracket = search.LowerEndpointAndGuess(0.0, FIRST_DISTANCE)
        found = search.calibrate_dp_mechanism(
            lambda: _Accountant(accountant, paid), at, target_epsilon, delta, bracket, tol=math.log(TOLERANCE) / 2
        )
    except search.NoBracketIntervalFoundError:
        if more:
            raise PrivacyError(
                f"target_epsilon={target_epsilon} needs noise_multiplier > {MOST:.0f}; raise the "
                "target or delta, or lower num_rounds, local_steps or sample_rate"
            ) from None
        raise PrivacyError(
            f"target_epsilon={target_epsilon} needs noise_multiplier < {LEAST}, which "
            "gives no useful privacy; lower the target or delta"
        ) from None
    return at(found).noise_multiplier


class _Accountant:
    """What dp_accounting's calibration asks of an accountant; ``epsilon`` answers, so the PLD grid fits the event."""

    def __init__(self, name: str, paid: History) -> None:
        from dp_accounting import NoOpDpEvent

        self.name, self.paid, self.ledger = name, paid, NoOpDpEvent()

    def compose(self, event: PrivacyEvent) -> _Accountant:
        self.event = event
        return self

    def get_epsilon(self, delta: float) -> float:
        return epsilon([*self.paid, self.event], delta, self.name)


def epsilon_table(
    noise_multiplier: float,
    sample_rate: float,
    local_steps: int,
    rounds: Sequence[int],
    delta: float,
    kind: str = "poisson_gaussian",
    paid: History = (),
) -> list[EpsilonRow]:
    """One row for each entry of ``rounds``: epsilon of a client with ``local_steps`` steps in each round.

    It includes what the client has ``paid`` beside training.
    """
    rows = []
    for count in rounds:
        steps = local_steps * count
        event = PrivacyEvent(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps, kind=kind)
        history = [*paid, event]
        rdp = epsilon(history, delta, "rdp") if has_rdp(history) else None
        rows.append(EpsilonRow(rounds=count, epsilon_pld=epsilon(history, delta), epsilon_rdp=rdp))
    return rows


def _guess(target_epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """By the central limit theorem, many steps are close to one Gaussian mechanism (Bu et al. 2020, mu of GDP).

    The variance of the loss of a Laplace step with much noise is that of a Gaussian one, so the guess is the same.
    """
    from dp_accounting.gaussian_mechanism import get_sigma_gaussian  # type: ignore[import-untyped]

    mu = 1 / get_sigma_gaussian(min(target_epsilon, 1e6), delta)
    noise = 1 / math.sqrt(math.log1p((mu / sample_rate) ** 2 / steps))
    return min(max(noise, 2 * LEAST), MOST / 2)
