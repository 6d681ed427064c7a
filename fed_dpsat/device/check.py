"""Everything in a policy that a device can check without a server, beyond what ``Policy`` checks when it is made.

Names are looked up as a run would look them up, which imports them: the owner of the device has listed them.
"""

from __future__ import annotations

import difflib
import ssl
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from fed_dpsat import plugins
from fed_dpsat.accounting import PrivacyEvent, epsilon, large_delta
from fed_dpsat.device.data import size
from fed_dpsat.device.joining import private_key
from fed_dpsat.device.policy import Policy, PolicyError
from fed_dpsat.errors import InputError, SettingError
from fed_dpsat.settings.flat import SPECS

PLUGINS = {
    **{"features": "features", "models": "model", "tasks": "task", "optimizers": "optimizer", "clippings": "clipping"},
    "strategies": "strategy",
}
"""By the list of a policy, the kind of its names."""
LARGE_EPSILON = 20.0
"""A budget above this permits a likelihood ratio of 5e8 for one example."""


def problems(policy: Policy) -> list[str]:
    """What is wrong with names, arguments, keys and files of the policy, each with a remedy; it reads no example."""
    return [*_plugins(policy), *_adapters(policy), *_files(policy)]


def problems_of_data(policy: Policy) -> list[str]:
    """What is wrong with the data, for each task that the policy permits; the texts may hold data, and stay here."""
    return [said for task in policy.tasks if (said := _said(partial(size, policy, task=task)))]


def advice(policy: Policy) -> list[str]:
    """Warnings about a budget that protects little, or pays for no round; reads the number of examples or persons."""
    found, budget = [], policy.largest_epsilon
    if warning := large_delta(policy.largest_delta, policy.privacy_unit, size(policy)):
        found.append(f"largest_delta: {warning}")
    if budget > LARGE_EPSILON:
        found.append(f"largest_epsilon={budget:g} is above {LARGE_EPSILON:g}, which protects little; 1 to 8 is usual")
    if (cost := costliest_round(policy)) and cost > budget:
        found.append(
            f"largest_epsilon={budget:g} is below {cost:.3g}, the epsilon of one round at all limits together "
            f"(least_noise_multiplier={policy.least_noise_multiplier:g}, "
            f"largest_sample_rate={policy.largest_sample_rate:g}, largest_local_steps={policy.largest_local_steps}): "
            "the budget refuses such a round, so narrower limits would tell a server more"
        )
    return found


def costliest_round(policy: Policy) -> float | None:
    """Epsilon (RDP, an upper bound) of one round at the limits of the policy; None if no noise is Gaussian."""
    if "gaussian" not in policy.noise_distributions:
        return None
    event = PrivacyEvent(
        noise_multiplier=policy.least_noise_multiplier,
        sample_rate=policy.largest_sample_rate,
        steps=policy.largest_local_steps,
    )
    return epsilon([event], policy.largest_delta, "rdp")


def _plugins(policy: Policy) -> Iterator[str]:
    """Names that lead to no plug-in, and arguments that none of the listed plug-ins takes."""
    for setting, kind in PLUGINS.items():
        taken: set[str] = set()
        for name in getattr(policy, setting):
            if said := _said(load := partial(plugins.load, kind, name)):
                yield f"{setting}: {said}"
            else:
                taken |= set(plugins.parameters(kind, name, load()))
        for text in getattr(policy, f"{kind}_args"):
            if said := _said(parse := partial(plugins.parse_arguments, kind, text)):
                yield said
            elif not any(name.startswith("**") for name in taken):
                yield from (_unknown(f"{kind}_args", name, taken) for name in sorted(parse().keys() - taken))


def _adapters(policy: Policy) -> Iterator[str]:
    known = [name for name in SPECS["adapter"].metadata["choices"] if name]
    return (_unknown("adapters", name, known) for name in policy.adapters if name not in known)


def _files(policy: Policy) -> Iterator[str]:
    if policy.start_from and not Path(policy.start_from).exists():
        yield str(SettingError("start_from", policy.start_from, "a file", "write the path of the weights"))
    checks: dict[str, Callable[[], object]] = {
        "server": partial(address, policy.server),
        "root_certificates": partial(authority, policy.root_certificates),
        "private_key": partial(private_key, policy),
    }
    if not any(getattr(policy, name) for name in checks):
        return
    for name, check in checks.items():
        if not getattr(policy, name):
            yield f"{name} is missing; `fed-dpsat device run` needs {', '.join(checks)}"
        elif said := _said(check):
            yield said


def address(server: str) -> tuple[str, int]:
    """Host and port; raises ``PolicyError``."""
    host, _, port = server.rpartition(":")
    if not host or not port.isdigit():
        raise PolicyError(f"server={server!r} is not of the form host:port; correct the policy")
    return host.strip("[]"), int(port)


def authority(root_certificates: str) -> ssl.SSLContext:
    """What accepts certificates of this authority alone; raises ``PolicyError``."""
    remedy = "get it from the operator of the server"
    try:
        return ssl.create_default_context(cafile=root_certificates)
    except (OSError, ssl.SSLError) as error:
        bound = "a file" if isinstance(error, FileNotFoundError) else "a certificate in PEM"
        raise PolicyError(str(SettingError("root_certificates", root_certificates, bound, remedy))) from None


def _said(check: Callable[[], object]) -> str:
    """What ``check`` raises, "" if it raises nothing."""
    try:
        check()
    except InputError as error:
        return str(error)
    except Exception as error:  # of a plug-in, or of a function with data, while it is imported or called
        return f"{type(error).__name__}: {error}"
    return ""


def _unknown(setting: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known)
    return f"{setting}={name!r} is not known; did you mean {', '.join(near) or 'none'}?"
