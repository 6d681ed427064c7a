"""The group of settings of privacy, and its checks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fed_dpsat.settings.paths import of_file, of_plugin
from fed_dpsat.settings.values import refuse, setting


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """Privacy: the unit, clipping, noise, budgets and the accountant."""

    privacy_unit: str = setting(
        "example",
        "what epsilon protects: example (of one client; noise on the client), user (a person of user_column, with all "
        "their examples in one client; noise on the client) or client (with all its examples; noise by a trusted "
        "server)",
        choices=("example", "user", "client"),
    )
    user_examples: int = setting(
        8, "largest number of a person's examples in a step with privacy_unit=user, drawn anew in each step", least=1
    )
    user_gradient: str = setting(
        "mean",
        "gradient of a person that is clipped with privacy_unit=user: the mean of those of their examples, or the sum",
        choices=("mean", "sum"),
    )
    private: bool = setting(
        True,
        "switch: false trains without noise, whatever noise_multiplier and target_epsilon are, and reports epsilon = "
        "inf",
    )
    clipping: str = setting("flat", "clipping rule", path=of_plugin)
    clipping_args: str = setting("", "arguments of the clipping rule that no setting fills: groups = 4")
    clip_norm: float = setting(
        0.5,
        "largest norm of the gradient of one example, or of one person, or of a client's whole change, as the unit is; "
        "inf only if not private",
        above=0,
    )
    clip_quantile: float = setting(0.5, "share of examples that adaptive clipping leaves unclipped", above=0, most=1)
    clip_lr: float = setting(0.2, "speed at which adaptive clipping follows the quantile", least=0)
    global_threshold: float = setting(10.0, "gradient norm beyond which global clipping drops an example", above=0)
    noise_distribution: str = setting(
        "gaussian",
        "distribution of the noise: gaussian, or laplace for the numbers of zeroth-order steps, with clipping=l1",
        choices=("gaussian", "laplace"),
    )
    noise_mechanism: str = setting(
        "independent",
        "correlation of the noise over rounds, with privacy_unit=client: independent, or noise that cancels in later "
        "rounds and is charged once for the whole run: band-mf, blt, bisr, tree, or your own",
        path=of_plugin,
    )
    noise_bands: int = setting(
        0,
        "number of rounds over which the noise of band-mf and bisr cancels; 0 is min_separation for band-mf, and 16 "
        "at most",
        least=0,
    )
    noise_buffers: int = setting(4, "largest number of buffers of blt, each as large as the model", least=1, most=8)
    noise_multiplier: float = setting(
        0.0,
        "noise on the sum, in clip norms (laplace: its scale); 0 is for target_epsilon",
        least=0,
    )
    target_epsilon: float = setting(
        0.0, "epsilon of the whole run, noise is calibrated to it; 0 is for noise_multiplier", least=0
    )
    budget_mode: str = setting(
        "calibrate",
        "way target_epsilon is kept: calibrate finds noise for the schedule, retire takes noise_multiplier and stops "
        "asking a client whose next round would exceed it",
        choices=("calibrate", "retire"),
    )
    client_table: str = setting(
        "", "CSV file of clients that differ: client, target_epsilon, sample_rate, first_round", path=of_file
    )
    delta: float = setting(1e-5, "delta of the guarantee", above=0, most=1)
    accountant: str = setting("pld", "accountant of the epsilon that is reported: pld, rdp", choices=("pld", "rdp"))
    release_counts: bool = setting(
        False, "switch: clients send how many examples had no finite gradient; exact, and not covered by epsilon"
    )


def noise_unused(config: Privacy) -> list[str]:
    """Names of the settings of noise and budget that ``private=false`` turns off."""
    return [] if config.private else [name for name in ("noise_multiplier", "target_epsilon") if getattr(config, name)]


def check(config: Privacy) -> None:
    """Raise ``SettingError`` for settings of this group that exclude each other."""
    noise, target = config.noise_multiplier, config.target_epsilon
    for name, unset in (("user_examples", 8), ("user_gradient", "mean")):
        if config.privacy_unit != "user" and getattr(config, name) != unset:
            refuse(config, name, f"possible with privacy_unit={config.privacy_unit!r}", "set privacy_unit=user")
    if config.noise_distribution == "laplace" and config.clipping != "l1" and ":" not in config.clipping:
        bound = "a bound of the L1 norm, to which noise_distribution='laplace' is scaled"
        refuse(config, "clipping", bound, "set clipping=l1, or noise_distribution=gaussian")
    if config.delta >= 1:
        refuse(config, "delta", "in (0, 1)", "below 1 / examples per client is usual")
    if not config.private:
        return
    if config.budget_mode == "retire" and noise == 0:
        remedy = "that mode spends budgets at a noise you set"
        refuse(config, "noise_multiplier", "enough for budget_mode='retire'", remedy)
    if config.budget_mode == "calibrate" and noise > 0 and target > 0:
        refuse(
            config,
            "noise_multiplier",
            f"usable together with target_epsilon={target}",
            "keep one and set the other to 0, or budget_mode=retire to spend a budget at a noise you set",
        )
    if config.budget_mode == "calibrate" and noise == 0 and target == 0:
        refuse(
            config,
            "target_epsilon",
            "enough to be private while noise_multiplier=0",
            "set one of the two above 0, or private=false",
        )
    if math.isinf(config.clip_norm):
        refuse(config, "clip_norm", "finite in a private run", "noise needs a bound; 0.1 to 1 is usual")
