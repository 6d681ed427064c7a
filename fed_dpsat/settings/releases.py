"""The group of settings of releases beside training, and its checks."""

from __future__ import annotations

from dataclasses import dataclass

from fed_dpsat.settings.paths import of_file
from fed_dpsat.settings.values import refuse, setting

LINES = ("moments", "quantiles", "labels", "sizes")
"""What ``statistics`` can name."""


@dataclass(frozen=True, kw_only=True)
class Releases:
    """Releases beside training: statistics of the clients' data."""

    statistics: str = setting(
        "moments",
        "what `fed-dpsat stats` releases, by commas: moments (mean, std and missing values of each column), quantiles "
        "(of each column), labels (a histogram), sizes (examples per client)",
    )
    statistics_epsilon: float = setting(
        0.0, "epsilon of `fed-dpsat stats`, of all that it releases together; 0 is for a run alone", least=0
    )
    statistics_columns: str = setting(
        "", "columns of moments and quantiles, by commas; empty is for all inputs that declare low and high"
    )
    statistics_bins: int = setting(
        32, "number of equal bins between low and high in which quantiles count", least=2, most=4096
    )
    statistics_examples: int = setting(
        1,
        "number of examples up to which a client's weight in the statistics grows, with privacy_unit=client; 1 gives "
        "all clients one weight",
        least=1,
    )
    statistics_from: str = setting(
        "",
        "folder of `fed-dpsat stats` whose means and deviations are the declared constants of the columns, and whose "
        "charges are part of the run's epsilon",
        path=of_file,
    )


def check(config: Releases) -> None:
    """Raise ``SettingError`` for settings of this group that exclude each other."""
    names = [name.strip() for name in config.statistics.split(",")]
    if wrong := [name for name in names if name not in LINES]:
        refuse(config, "statistics", f"a list of {', '.join(LINES)}", f"{wrong[0]!r} is none of them")
    if len(set(names)) < len(names):
        refuse(config, "statistics", "without repetition", "name each once")
