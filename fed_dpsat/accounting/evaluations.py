"""What the evaluations of a run cost each client: one Gaussian mechanism in each round that is evaluated.

An evaluation of a round has a charge of its own beside that of training: its attempts are numbered from
``EVALUATIONS``. Training and evaluation are added up, although an example pays for one of the two: a ledger has one
history for a client.
"""

from __future__ import annotations

from functools import lru_cache

from fed_dpsat.accounting.calibration import noise_multiplier_for
from fed_dpsat.accounting.event import CLIENTS, DISTRIBUTIONS, History, PrivacyEvent
from fed_dpsat.settings.config import RunConfig

KIND = {"example": DISTRIBUTIONS["example"]["gaussian"], "client": CLIENTS}
"""By privacy unit, the kind of event of a Gaussian mechanism on totals; the unit "user" has none yet."""


def is_evaluated(config: RunConfig, round: int) -> bool:
    """Whether the model after ``round`` is evaluated; clients do not evaluate the initial one."""
    due = round % config.evaluate_every == 0 or round == config.num_rounds
    return due and (round > 0 or config.evaluate == "server")


def evaluation_event(config: RunConfig) -> PrivacyEvent:
    """The event of one evaluation: ``evaluation_budget`` is the epsilon of all of them together."""
    kind = KIND[config.privacy_unit]
    count = sum(is_evaluated(config, round) for round in range(1, config.num_rounds + 1))
    noise = _noise(config.evaluation_budget, config.delta, count, config.accountant, kind)
    return PrivacyEvent(noise_multiplier=noise, sample_rate=1.0, steps=1, kind=kind)


def evaluation_history(config: RunConfig) -> History:
    """All evaluations of a run; empty unless clients evaluate."""
    if config.evaluate == "server":
        return ()
    return (evaluation_event(config),) * sum(is_evaluated(config, r) for r in range(1, config.num_rounds + 1))


@lru_cache(maxsize=64)
def _noise(budget: float, delta: float, count: int, accountant: str, kind: str) -> float:
    return noise_multiplier_for(budget, delta, 1.0, count, accountant, kind)
