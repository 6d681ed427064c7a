"""What may change when a run is resumed: settings of the machine, the place of a file, and a larger ``num_rounds``.

An extended run gives the bits and the account of a run that had the larger ``num_rounds`` from its start. So it is
refused if the number of rounds decides more than the end:

==================================== ==================================================================
case                                 why
==================================== ==================================================================
noise calibrated to target_epsilon   it is enough for the rounds of the run, and no more
noise that is correlated over rounds it was made for the rounds of the run, and charged before the first
lr_schedule other than constant      the rates of the first rounds were made for another end
random-freeze, or a plug-in that     it may have used the number of rounds from the first one
takes num_rounds, total_steps or
known_noise
evaluate=clients                     the noise of evaluations is enough for those of the run, and no more
a run that ended early               clients or budgets are spent
states of clients deleted            a finished run of a sweep; clients would begin anew
==================================== ==================================================================
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fed_dpsat import plugins
from fed_dpsat.accounting.plans import make_plans
from fed_dpsat.errors import SettingError
from fed_dpsat.run.inputs import PLUGINS, plugin_names
from fed_dpsat.settings.config import MACHINE, RunConfig
from fed_dpsat.settings.flat import SPECS
from fed_dpsat.settings.paths import without_folders

ONLY_FOR_A_SCHEDULE = frozenset({"dp-sgd", "adam", "modelmix"})
"""Built-in plug-ins that take the number of rounds, and use it for ``lr_schedule`` alone."""
MAY_CHANGE = "num_rounds can grow, and " + ", ".join(sorted(MACHINE)) + " can change"


def changed_settings(begun: RunConfig, now: RunConfig) -> list[str]:
    """Names of the settings that would make a run another one; a file may lie in another folder.

    Its content is compared apart (``run.inputs``).
    """
    before, after = (without_folders(config.settings(), SPECS.values()) for config in (begun, now))
    return [name for name, value in before.items() if value != after[name] and name not in MACHINE]


def check_resumed(begun: RunConfig, now: RunConfig, run: str) -> None:
    """Raise ``SettingError`` unless the ``run`` that has begun can go on with the settings ``now``."""
    differ = changed_settings(begun, now)
    if others := [name for name in differ if name != "num_rounds"]:
        bound = f"possible for {run} with other settings ({', '.join(others)})"
        raise SettingError("resume", True, bound, f"{MAY_CHANGE}; start a new run for the rest")
    if differ:
        _check_rounds(begun, now, run)


def _check_rounds(begun: RunConfig, now: RunConfig, run: str) -> None:
    def refuse(why: str, remedy: str = "start a new run") -> None:
        bound = f"possible for {run}, which began with num_rounds={begun.num_rounds}: {why}"
        raise SettingError("num_rounds", now.num_rounds, bound, remedy)

    if now.num_rounds < begun.num_rounds:
        refuse("a run can only be extended", "Ctrl-C ends a run after any round")
    if begun.noise_mechanism != "independent":
        refuse(f"its noise_mechanism={begun.noise_mechanism!r} was made for these rounds, and charged before the first")
    if begun.lr_schedule != "constant":
        refuse(f"lr_schedule={begun.lr_schedule!r} spans all rounds, so earlier rates would have been others")
    for kind in PLUGINS:
        for name in plugin_names(begun, kind):
            of_kind = "optimizer" if kind == "base_optimizer" else kind
            taken = {"num_rounds", "total_steps", "known_noise"} & set(
                plugins.parameters(of_kind, name, plugins.load(of_kind, name))
            )
            built_in = taken == {"known_noise"} and name in plugins.builtin(of_kind)  # it uses that for schedules too
            if taken and name not in ONLY_FOR_A_SCHEDULE and not built_in:
                refuse(f"{kind}={name!r} takes {min(taken)}, so earlier rounds may have been others")
    if begun.evaluate == "clients":
        refuse("the noise of its evaluations was calibrated to these rounds")
    events = [[plan.event for plan in make_plans(config)] for config in (begun, now)]
    if events[0] != events[1]:
        remedy = "start a new run, with noise_multiplier in place of target_epsilon, or budget_mode=retire"
        refuse(f"its noise was calibrated to target_epsilon={begun.target_epsilon:g} for these rounds", remedy)


def stored(begun: RunConfig, now: RunConfig) -> RunConfig:
    """The settings of a resumed run: those with which it began, its new end and the new places of its files."""
    moved: dict[str, Any] = {name: value for name, value in now.settings().items() if name not in MACHINE}
    return dataclasses.replace(begun, **moved)
