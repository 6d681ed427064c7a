"""Whether a run has an epsilon against someone who sees its released models alone, and which; if not, why not.

``privacy.released`` has the figure. It rests on coins of a chance that is the same whatever fell before, and on what
the models show of them; each reason here is a way in which earlier or other coins show.
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
"""Of ``rounds.jsonl``."""


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
    """``epsilon_released`` of the rounds in ``lines`` and what it assumes; None and the reason where no proof stands.

    Empty for a run that asks for no such figure: without coins, of the unit "client", or without a round. ``redone``
    says that a round was begun twice with other coins, ``retired`` that a client left. ``shows_single`` is the name of
    a strategy that uses more than the mean of replies.
    """
    config = experiment.config
    rounds = [line for line in lines if line["round"]]
    if config.client_sampling != "poisson" or config.privacy_unit != "example" or not rounds:
        return {}
    for reason in _reasons(experiment, plans, rounds, retired, shows_single):
        return _missing(reason)
    if status == "failed":
        return _missing("the run failed, which may have depended on who took part")
    if redone:
        return _missing("a round that was interrupted was done again with other coins, and may have been seen")
    first = min(plans, key=lambda plan: plan.first_round)  # who is there longest has tossed most coins
    cohorts = [Cohort(len(line["asked"]), line["tossed"]) for line in rounds if line["round"] >= first.first_round]
    found = epsilon_of_models(first.event, cohorts, config.client_rate, config.delta, config.accountant)
    return {"epsilon_released": found, "epsilon_released_assumptions": ASSUMPTIONS}


def _missing(reason: str) -> dict[str, Any]:
    return {"epsilon_released": None, "epsilon_released_missing": reason}


def _reasons(
    experiment: Experiment, plans: Sequence[ClientPlan], rounds: Lines, retired: bool, shows_single: str
) -> Iterator[str]:
    config = experiment.config
    if carried := experiment.carried_state():
        yield (
            f"clients keep state between rounds ({', '.join(sorted(carried))}), so a later update tells whether a "
            "client took part earlier"
        )
    if config.rounds_per_client < config.num_rounds:
        yield "with max_rounds_per_client, who may take part depends on earlier coins, which are secret"
    if retired or any(_may_retire(experiment, plan) for plan in set(plans)):
        yield "budgets can end before the rounds do, so who may take part, and when the run ends, depends on coins"
    sizes = [len(indices) for indices in experiment.partitions]
    if len({plan.event for plan in plans}) > 1 or len(set(sizes)) > 1:
        yield (
            "clients differ in size, noise or sample rate, so the level of the noise in a model tells who took part; "
            "validation_share can leave as many examples as divide evenly"
        )
    if config.secure_aggregation:
        yield "with secure_aggregation the model stays also in rounds of too few clients, which tells of their number"
    if shows_single:
        yield f"{shows_single} uses more than the mean of replies, so it may show who took part"
    if config.attack:
        yield "attackers compute on each other's data, without a coin"
    if config.dropout_rate or (config.client_timeout and config.delay != "none"):
        yield "who is away or late is drawn from the public seed, which leaves fewer clients to have moved the model"
    joined = {line["round"]: sum(p.first_round <= line["round"] for p in plans) for line in rounds}
    for line in rounds:
        if line["dropped"] or line.get("tossed") != joined[line["round"]]:
            yield (
                f"not every client tossed a coin in round {line['round']}, or not all that were drawn replied: others "
                "may know who was away"
            )


def _may_retire(experiment: Experiment, plan: ClientPlan) -> bool:
    config = experiment.config
    if math.isinf(plan.budget):
        return False
    most = config.num_rounds - plan.first_round + 1
    return epsilon([plan.event] * most, config.delta, config.accountant) > plan.budget
