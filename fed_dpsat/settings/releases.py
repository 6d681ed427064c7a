"""The group of settings of releases beside training, and its checks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fed_dpsat.settings.paths import of_file
from fed_dpsat.settings.values import refuse, setting

LINES = ("moments", "quantiles", "labels", "sizes")
"""What ``statistics`` can name."""


@dataclass(frozen=True, kw_only=True)
class Releases:
    """Releases beside training: evaluation on the clients' examples, and statistics of their data."""

    evaluate: str = setting(
        "server",
        "who evaluates the global model: server (exactly, on the test split or on validation examples) or clients "
        "(with noise, on examples that they hold out)",
        choices=("server", "clients"),
    )
    holdout_share: float = setting(
        0.0,
        "share of each client's examples that are for evaluate=clients alone, by a seeded coin of each example",
        least=0,
        most=0.9,
    )
    evaluation_budget: float = setting(
        0.0, "epsilon of all evaluations of the run with evaluate=clients together; a part of target_epsilon", least=0
    )
    evaluation_metrics: str = setting(
        "",
        "what evaluate=clients releases beside loss, and accuracy or mae, by commas: confusion, scores, calibration",
    )
    loss_bound: float = setting(5.0, "largest loss of an example in evaluate=clients; a larger one is clipped", above=0)
    error_bound: float = setting(
        0.0, "largest absolute error of an example in evaluate=clients, for mae; a larger one is clipped", least=0
    )

    statistics: str = setting(
        "moments",
        "what fed-dpsat stats releases, by commas: moments (mean, std and missing values of each column), quantiles "
        "(of each column), labels (a histogram), sizes (examples per client)",
    )
    statistics_epsilon: float = setting(
        0.0, "epsilon of fed-dpsat stats, of all that it releases together; 0 is for a run alone", least=0
    )
    statistics_columns: str = setting(
        "", "columns of moments and quantiles, by commas; empty is for all inputs that declare low and high"
    )
    statistics_bins: int = setting(
        32, "number of equal bins between low and high in which quantiles count", least=2, most=4096
    )
    statistics_examples: int = setting(
        1,
        "number of examples up to which a client's weight in statistics and evaluations grows, with "
        "privacy_unit=client; 1 gives all clients one weight",
        least=1,
    )
    statistics_from: str = setting(
        "",
        "folder of fed-dpsat stats whose means and deviations are the declared constants of the columns, and whose "
        "charges are part of the run's epsilon",
        path=of_file,
    )


METRICS = ("confusion", "scores", "calibration")
"""What ``evaluation_metrics`` can name."""


def check(config: Releases) -> None:
    """Raise ``SettingError`` for settings of this group that exclude each other."""
    _check_evaluation(config)
    names = named(config.statistics)
    if not names:
        refuse(config, "statistics", f"a list of {', '.join(LINES)}", "name one")
    if wrong := [name for name in names if name not in LINES]:
        refuse(config, "statistics", f"a list of {', '.join(LINES)}", f"{wrong[0]!r} is not in it")
    if len(set(names)) < len(names):
        refuse(config, "statistics", "without repetition", "name each once")


def _check_evaluation(config: Releases) -> None:
    by_clients = config.evaluate == "clients"
    for name in ("holdout_share", "evaluation_budget"):
        if by_clients and not getattr(config, name):
            refuse(config, name, "enough for evaluate='clients'", "set it above 0: 0.2 or 0.5, say")
        if not by_clients and getattr(config, name):
            refuse(config, name, "possible with evaluate='server'", "set evaluate=clients, or leave it out")
    if math.isinf(config.loss_bound):
        refuse(config, "loss_bound", "finite", "noise needs a bound; 2 to 10 is usual")
    names = named(config.evaluation_metrics)
    if wrong := [name for name in names if name not in METRICS]:
        refuse(config, "evaluation_metrics", f"a list of {', '.join(METRICS)}", f"{wrong[0]!r} is not in it")
    if len(set(names)) < len(names):
        refuse(config, "evaluation_metrics", "without repetition", "name each once")


def named(text: str) -> list[str]:
    """Names by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]
