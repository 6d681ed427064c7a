"""The group of settings of the federation, and its checks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fed_dpsat.settings.paths import of_plugin
from fed_dpsat.settings.values import refuse, setting


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Federation: the strategy, cohorts, messages, attackers and absent clients."""

    strategy: str = setting(
        "fedavg",
        "server strategy, any Flower strategy: a short name, a class of Flower such as FedAdam, or "
        "package.module:attribute",
        path=of_plugin,
    )
    strategy_args: str = setting("", "arguments of the strategy that no setting fills: eta = 0.02, tau = 1e-3")
    local_models: int = setting(
        0,
        "number of models that a client trains in a round, local_steps steps each, by the client's half of the "
        "strategy; 0 is for a strategy without one, and a simulation takes it from the strategy",
        least=0,
    )
    keep_share: float = setting(
        1.0,
        "share of the coordinates of its change that a client keeps, the largest, before it is clipped; below 1 with "
        "privacy_unit=client",
        above=0,
        most=1,
    )
    update_codec: str = setting(
        "fp32",
        "encoding of a client's update for the network: fp32, bf16, top-k (largest changes), random-k (unbiased)",
        choices=("fp32", "bf16", "top-k", "random-k"),
    )
    update_share: float = setting(0.1, "share of the coordinates that top-k and random-k send", above=0, most=1)
    num_rounds: int = setting(30, "number of rounds", least=1)
    clients_per_round: int = setting(0, "number of clients drawn per round; 0 asks all", least=0)
    client_sampling: str = setting(
        "fixed",
        "way a cohort is drawn: fixed draws clients_per_round, poisson tosses a coin for each client, cyclic tosses "
        "one for each client of the group whose turn it is, of noise_bands groups",
        choices=("fixed", "poisson", "cyclic"),
    )
    min_separation: int = setting(
        1, "least number of rounds from a round of a client to its next one, in cohorts of a fixed size", least=1
    )
    buffer_size: int = setting(
        0,
        "number of arrivals that make a round (FedBuff), while clients_per_round train; 0 waits for the cohort",
        least=0,
    )
    staleness_exponent: float = setting(
        0.5, "discount of updates that started s rounds ago, (1 + s) to the power of minus this", least=0
    )
    max_rounds_per_client: int = setting(0, "largest number of rounds of one client; 0 is num_rounds", least=0)
    min_clients: int = setting(1, "least number of clients with budget left; with fewer the run ends", least=1)
    secure_aggregation: bool = setting(
        False, "switch: the server sees only sums of updates; epsilon is still for an observer of each update"
    )
    secure_threshold: float = setting(
        0.67,
        "share of a cohort that must stay to the end of a round, or its sum is lost; a majority",
        above=0.5,
        most=1,
    )
    attack: str = setting("", "attack that attackers simulate; empty is for no attackers", path=of_plugin)
    attack_args: str = setting("", "arguments of the attack: factor = 10")
    attackers: float = setting(0.0, "share of clients that attack, drawn from the seed", least=0, most=1)
    dropout_rate: float = setting(
        0.0, "simulated chance of a client of the cohort to be absent; it stays charged", least=0, most=1
    )
    delay: str = setting(
        "none",
        "simulated time until a reply: none, exponential, lognormal; the run does not wait for it",
        choices=("none", "exponential", "lognormal"),
    )
    delay_mean: float = setting(1.0, "mean of the simulated delay in seconds", above=0)
    client_timeout: float = setting(
        0.0,
        "largest time in seconds for a client: a simulated delay, or a worker at one client; 0 is no limit",
        least=0,
    )
    join_timeout: float = setting(60.0, "time in seconds until all clients must have joined", above=0, may_change=True)
    reply_timeout: float = setting(
        3600.0, "time in seconds to wait for the replies of a round", above=0, may_change=True
    )


def check(config: Federation) -> None:
    """Raise ``SettingError`` for settings of this group that exclude each other."""
    if config.dropout_rate >= 1:
        refuse(config, "dropout_rate", "in [0, 1)", "no client would ever reply")
    if config.min_separation > 1 and config.client_sampling != "fixed":
        bound = f"1 with client_sampling={config.client_sampling!r}"
        refuse(config, "min_separation", bound, "coins keep no distance; use fixed")
    if config.min_separation > config.num_rounds:
        refuse(config, "min_separation", f"at most num_rounds={config.num_rounds}", "lower it")
    if math.isinf(config.delay_mean):
        refuse(config, "delay_mean", "finite", "no client would ever reply")
    if config.secure_aggregation:
        if config.update_codec != "fp32":
            remedy = "masked sums need every coordinate; use fp32"
            refuse(config, "update_codec", "possible with secure_aggregation", remedy)
        if config.buffer_size:
            remedy = "masks cancel within one cohort; set it to 0"
            refuse(config, "buffer_size", "possible with secure_aggregation", remedy)
    if config.buffer_size:
        if config.delay == "none":
            remedy = "clients arrive in the order of simulated delays: lognormal, say"
            refuse(config, "delay", "enough for buffer_size", remedy)
        if config.client_sampling != "fixed":
            bound = f"possible with buffer_size={config.buffer_size}"
            refuse(config, "client_sampling", bound, "places are filled: use fixed")
        if config.min_separation > 1:
            bound = f"1 with buffer_size={config.buffer_size}"
            refuse(config, "min_separation", bound, "clients arrive when they are ready")
    if bool(config.attack) != (config.attackers > 0):
        bound = f"possible with attack={config.attack!r}"
        refuse(config, "attackers", bound, "give both a share of clients and an attack")
