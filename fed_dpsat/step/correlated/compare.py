"""Correlated noise beside independent noise of the same epsilon, for the same rounds of a client."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from fed_dpsat.accounting import epsilon, noise_multiplier_for
from fed_dpsat.accounting.plans import plan_of
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.correlated.base import errors
from fed_dpsat.step.correlated.choose import factorization_of, participation_of


@dataclass(frozen=True, kw_only=True)
class PartialSums:
    """The noise in sums of the first t rounds, for all t: root mean square and largest deviation, in clip norms.

    The sums are of clipped changes, before the division by the size of a cohort. ``step_deviation`` is the largest
    deviation of the noise of one round. Figures that begin with ``independent`` are of independent noise, for the same
    epsilon; ``keeps`` says what the cohorts have to keep.
    """

    noise_mechanism: str
    sensitivity: float
    mean: float
    largest: float
    step_deviation: float
    independent_noise_multiplier: float
    independent_mean: float
    independent_largest: float
    keeps: str


def partial_sums(config: RunConfig, noise_multiplier: float) -> PartialSums:
    """The comparison for a run of ``config`` at ``noise_multiplier``."""
    factorization, participation = factorization_of(config), participation_of(config)
    found = errors(factorization, participation)
    alone = _independent_noise(config, noise_multiplier)
    steps = config.num_rounds
    return PartialSums(
        noise_mechanism=config.noise_mechanism,
        sensitivity=found.sensitivity,
        mean=noise_multiplier * found.mean,
        largest=noise_multiplier * found.largest,
        step_deviation=noise_multiplier * found.sensitivity * float(factorization.deviations().max()),
        independent_noise_multiplier=alone,
        independent_mean=alone * math.sqrt((steps + 1) / 2),
        independent_largest=alone * math.sqrt(steps),
        keeps=kept_pattern(config),
    )


def kept_pattern(config: RunConfig) -> str:
    """What the cohorts of a run have to keep, as text."""
    if config.client_sampling == "cyclic":
        return (
            f"a client has a coin in every {config.separation}th round, that of its group, with probability "
            f"{config.amplifying_rate:g}"
        )
    return (
        f"a client is in at most {config.rounds_per_client} of {config.num_rounds} rounds, at least "
        f"{config.separation} apart"
    )


def _independent_noise(config: RunConfig, noise_multiplier: float) -> float:
    """The noise multiplier of a round of independent noise for the epsilon of ``config``."""
    if config.client_sampling == "fixed":  # Gaussians compose into one
        return noise_multiplier * math.sqrt(config.rounds_per_client)
    event = plan_of(dataclasses.replace(config, noise_multiplier=noise_multiplier, target_epsilon=0.0)).event
    cost = epsilon([event] * config.rounds_per_client, config.delta, config.accountant)
    return noise_multiplier_for(
        cost, config.delta, config.client_rate, config.num_rounds, config.accountant, event.kind
    )
