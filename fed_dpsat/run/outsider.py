"""Epsilon of a run against an observer who sees only its released models, or the reason why there is no proof.

``accounting.released`` computes this epsilon. It assumes that the rate of a coin does not depend on earlier coins, and
limits what a model reveals of the coins. Each reason in this module violates one of these assumptions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fed_dpsat.accounting import epsilon
from fed_dpsat.accounting.plans import ClientPlan
from fed_dpsat.accounting.released import ASSUMPTIONS, Cohort, epsilon_of_models
from fed_dpsat.client.build import Experiment

Lines = Sequence[Mapping[str, Any]]
"""Lines of ``rounds.jsonl``."""


def epsilon_of_outsider(
    experiment: Experiment,
    plans: Sequence[ClientPlan],
    lines: Lines,
    *,
    status: str,
    redone: bool,
    retired: bool,
    shows_single: str = "",
) -> dict[str, Any]:
    """``epsilon_released`` of the rounds in ``lines`` and its assumptions; without a proof, None and the reason.

    Empty for a run without coins, with another unit than "example", or without a round. ``redone``: a round started
    twice with other coins. ``retired``: a client has left. ``shows_single``: the name of a strategy that uses more than
    the mean of replies.
    """
    config = experiment.config
    rounds = [line for line in lines if line["round"]]
    if config.client_sampling != "poisson" or config.privacy_unit != "example" or not rounds:
        return {}
    for reason in _reasons(experiment, plans, rounds, retired, shows_single):
        return _missing(reason)
    if status == "failed":
        return _missing("the run failed, which may depend on the clients that took part")
    if redone:
        return _missing("an interrupted round ran again with other coins, and an observer may have seen both")
    first = min(plans, key=lambda plan: plan.first_round)  # the client of the most rounds has tossed the most coins
    cohorts = [Cohort(len(line["asked"]), line["tossed"]) for line in rounds if line["round"] >= first.first_round]
    found = epsilon_of_models(first.event, cohorts, config.client_rate, config.delta, config.accountant)
    return {"epsilon_released": found, "epsilon_released_assumptions": ASSUMPTIONS}


def _missing(reason: str) -> dict[str, Any]:
    return {"epsilon_released": None, "epsilon_released_missing": reason}


def _reasons(
    experiment: Experiment, plans: Sequence[ClientPlan], rounds: Lines, retired: bool, shows_single: str
) -> Iterator[str]:
    config = experiment.config
    if config.statistics_from:
        yield "the statistics before training are public and cost each client in full, whatever its coins"
    if config.evaluate == "clients":
        yield "each client pays for each evaluation in full, whatever its coins"
    if carried := experiment.carried_state():
        yield (
            f"clients keep state between rounds ({', '.join(sorted(carried))}), so a later update reveals whether a "
            "client took part earlier"
        )
    if config.rounds_per_client < config.num_rounds:
        yield "with max_rounds_per_client, the eligible clients depend on earlier coins, which are secret"
    if retired or any(_may_retire(experiment, plan) for plan in set(plans)):
        yield "budgets can end before the last round, so the eligible clients and the end of the run depend on coins"
    sizes = experiment.sizes
    if len({plan.event for plan in plans}) > 1 or len(set(sizes)) > 1:
        yield (
            "clients differ in size, noise or sample rate, so the level of the noise in a model reveals which clients "
            "took part; with validation_share the rest can divide evenly"
        )
    if config.secure_aggregation:
        yield "with secure_aggregation a round of too few clients keeps the model, which reveals their number"
    if shows_single:
        yield f"{shows_single} uses more than the mean of replies, so it may reveal which clients took part"
    if config.attack:
        yield "attackers compute on each other's data, without a coin"
    if config.dropout_rate or (config.client_timeout and config.delay != "none"):
        yield "the public seed draws absent and late clients, so an observer knows clients that did not take part"
    joined = {line["round"]: sum(p.first_round <= line["round"] for p in plans) for line in rounds}
    for line in rounds:
        if line["dropped"] or line.get("tossed") != joined[line["round"]]:
            yield (
                f"in round {line['round']} a client tossed no coin, or a sampled client did not reply: an observer "
                "may know which"
            )


def _may_retire(experiment: Experiment, plan: ClientPlan) -> bool:
    config = experiment.config
    if math.isinf(plan.budget):
        return False
    most = config.num_rounds - plan.first_round + 1
    return epsilon([plan.event] * most, config.delta, config.accountant) > plan.budget
