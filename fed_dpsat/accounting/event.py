"""Privacy events as data; a history is a sorted tuple of events.

The kind of an event states its privacy unit: one example of one client, one person with all their examples in one
client, or one whole client, each with add-or-remove adjacency. Events of two units have no common epsilon.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from fed_dpsat.errors import InputError

if TYPE_CHECKING:
    from dp_accounting import DpEvent  # type: ignore[import-untyped]

CLIENTS, LAPLACE = "poisson_gaussian_clients", "poisson_laplace"
USERS, LAPLACE_USERS = "poisson_gaussian_users", "poisson_laplace_users"
KINDS = {"poisson_gaussian": "example", LAPLACE: "example", USERS: "user", LAPLACE_USERS: "user", CLIENTS: "client"}
"""The privacy unit of each kind of event."""

CORRELATED = re.compile(r"correlated_gaussian_clients:([^,]+),steps=(\d+),participations=(\d+),separation=(\d+)")
"""The kind of one Gaussian mechanism over all rounds of a run: its name, and the schedule that its noise is for."""

DISTRIBUTIONS = {
    "example": {"gaussian": "poisson_gaussian", "laplace": LAPLACE},
    "user": {"gaussian": USERS, "laplace": LAPLACE_USERS},
}
"""By the unit of a client's own steps, the kind of event of each choice of ``noise_distribution``."""

UNITS = {
    "example": "one example of one client, add-or-remove; maximum over clients",
    "user": "one person with all their examples in one client, add-or-remove; maximum over clients",
    "client": "one whole client with all its examples, add-or-remove; maximum over clients",
}
"""What each privacy unit protects, as printed text."""

MAX_STEPS = 2**40


def correlated_kind(mechanism: str, *, steps: int, participations: int, separation: int) -> str:
    """The kind of event of a ``mechanism`` whose noise is correlated over ``steps`` rounds.

    A client takes part in at most ``participations`` of them, at least ``separation`` apart.
    """
    name = re.sub(r"[^\w.-]+", "_", mechanism)
    return f"correlated_gaussian_clients:{name},steps={steps},participations={participations},separation={separation}"


def unit_of(kind: str) -> str | None:
    """The privacy unit of a kind of event; None for a kind that this version does not know."""
    return "client" if CORRELATED.fullmatch(kind) else KINDS.get(kind)


class PrivacyError(InputError):
    """A number that has no privacy guarantee; the message gives a remedy."""


@dataclass(frozen=True, kw_only=True)
class PrivacyEvent:
    """``steps`` mechanisms, each on a fresh Poisson sample of the examples or persons of one client, or of the clients.

    A mechanism is Gaussian with a sum clipped in L2 norm, or Laplace with a sum clipped in L1 norm. Of a kind that
    ``CORRELATED`` matches, ``steps`` are rounds of one client in one Gaussian mechanism over the whole run, which costs
    the same however many they are: the first of them pays for all. A ledger has one such mechanism of a kind.

    ================ ============ =====================================================================
    field            unit, bound  meaning
    ================ ============ =====================================================================
    noise_multiplier >= 0, finite std (Gaussian) or scale (Laplace) of the noise on the clipped SUM over
                                  clip_norm; 0 costs epsilon = inf
    sample_rate      (0, 1]       probability that an example (person, client) joins a sum; 1 is no sampling
    steps            >= 1         mechanisms; an empty batch (round) counts too
    kind             ``KINDS``    the mechanism and its privacy unit
    ================ ============ =====================================================================

    The constructor raises ``PrivacyError`` for an invalid value.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    kind: str = "poisson_gaussian"

    def __post_init__(self) -> None:
        noise, rate = _real("noise_multiplier", self.noise_multiplier), _real("sample_rate", self.sample_rate)
        if not 0 <= noise < math.inf:
            raise PrivacyError(f"noise_multiplier={noise} is not in [0, inf); give a finite number, 0 for no privacy")
        if not 0 < rate <= 1:
            raise PrivacyError(
                f"sample_rate={rate} is not in (0, 1]; lower the expected batch size or give the client more examples"
            )
        if isinstance(self.steps, bool) or not isinstance(self.steps, numbers.Integral):
            raise PrivacyError(f"steps={self.steps!r} is not an integer; count the steps")
        if not 1 <= self.steps <= MAX_STEPS:
            raise PrivacyError(f"steps={self.steps} is not in [1, 2**40]; without a step, make no event")
        if unit_of(self.kind) is None:
            raise PrivacyError(
                f"kind={self.kind!r} is not one of {', '.join(KINDS)}; upgrade fed_dpsat if a newer version wrote it"
            )
        if self.participations and rate < 1:
            raise PrivacyError(f"sample_rate={rate} is not 1, and sampling amplifies no event of kind={self.kind!r}")
        object.__setattr__(self, "noise_multiplier", noise + 0.0)  # -0.0 becomes 0.0, so equal values hash equal
        object.__setattr__(self, "sample_rate", rate)
        object.__setattr__(self, "steps", int(self.steps))

    @property
    def privacy_unit(self) -> str:
        """What the event protects: "example", "user" or "client"."""
        return str(unit_of(self.kind))

    @property
    def participations(self) -> int:
        """The most steps of one client in a correlated mechanism; 0 for any other kind."""
        found = CORRELATED.fullmatch(self.kind)
        return int(found[3]) if found else 0

    @property
    def compositions(self) -> int:
        """The number of mechanisms that are composed: 1 for a correlated one, else ``steps``."""
        return 1 if self.participations else self.steps

    @property
    def is_laplace(self) -> bool:
        """Whether the noise is Laplace; otherwise it is Gaussian."""
        return self.kind in (LAPLACE, LAPLACE_USERS)

    def to_dp_event(self) -> DpEvent:
        """The same event as a ``DpEvent`` of dp_accounting."""
        import dp_accounting

        if self.noise_multiplier == 0:
            return dp_accounting.NonPrivateDpEvent()
        mechanism = dp_accounting.LaplaceDpEvent if self.is_laplace else dp_accounting.GaussianDpEvent
        step = mechanism(self.noise_multiplier)
        if self.sample_rate < 1:
            step = dp_accounting.PoissonSampledDpEvent(self.sample_rate, step)
        return dp_accounting.SelfComposedDpEvent(step, self.compositions)

    def to_dict(self) -> dict[str, float | int | str]:
        """A flat dict of scalars, for a ``ConfigRecord`` of Flower."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> PrivacyEvent:
        """The inverse of ``to_dict``; raises ``PrivacyError`` for another key or type."""
        types = {"noise_multiplier": float, "sample_rate": float, "steps": int, "kind": str}
        names = {field.name for field in fields(cls)}
        if record.keys() != names:
            raise PrivacyError(
                f"event keys {sorted(map(str, record))} are not {sorted(names)}; send what "
                "PrivacyEvent.to_dict() gives, nothing else"
            )
        for name, value in record.items():
            if type(value) is not types[name]:
                raise PrivacyError(
                    f"{name}={value!r} is a {type(value).__name__}, not a "
                    f"{types[name].__name__}; send what PrivacyEvent.to_dict() gives"
                )
        return cls(**record)


History = tuple[PrivacyEvent, ...]


def merge(events: Iterable[PrivacyEvent]) -> History:
    """The canonical history, sorted: events that differ only in steps become one event with the sum of steps.

    The order of composition does not matter to an accountant. So histories that differ only in order or grouping
    compare and hash equal.
    """
    steps: dict[tuple[str, float, float], int] = {}
    for event in events:
        mechanism = (event.kind, event.noise_multiplier, event.sample_rate)
        steps[mechanism] = steps.get(mechanism, 0) + event.steps
    return tuple(
        PrivacyEvent(kind=kind, noise_multiplier=noise, sample_rate=rate, steps=count)
        for (kind, noise, rate), count in sorted(steps.items())
    )


def check_one_unit(histories: Iterable[History]) -> None:
    """Raise ``PrivacyError`` if the events of ``histories`` have two privacy units."""
    units = {event.privacy_unit for history in histories for event in history}
    if len(units) > 1:
        raise PrivacyError(
            f"events of the units {' and '.join(sorted(units))} have no common epsilon; account for each alone"
        )


def dominant(histories: Iterable[History]) -> list[History]:
    """The histories (merged ones) that no other history dominates event by event.

    An event costs at most as much as another event of its kind with less or equal noise, and with a greater or equal
    rate and number of steps: more noise is post-processing, fewer steps are a part of a composition, and a lower
    rate is sampling again. So the maximum of epsilon over clients is the maximum over the returned histories. With
    one noise for all clients, this is the history of the client with the highest rate. The function compares only
    histories with the same number of events: it may keep a history without need, but never drops the costliest one.
    """
    front: dict[int, list[History]] = {}
    for history in sorted(set(histories), key=_costliest_first):
        rivals = front.setdefault(len(history), [])
        if not any(_costs_no_more(history, rival) for rival in rivals):
            rivals.append(history)
    return [history for rivals in front.values() for history in rivals]


def _costliest_first(history: History) -> list[tuple[str, float, float, int]]:
    return [(event.kind, event.noise_multiplier, -event.sample_rate, -event.steps) for event in history]


def _costs_no_more(history: History, other: History) -> bool:
    return all(
        ours.kind == theirs.kind
        and ours.noise_multiplier >= theirs.noise_multiplier
        and ours.sample_rate <= theirs.sample_rate
        and ours.steps <= theirs.steps
        for ours, theirs in zip(history, other, strict=True)
    )


def _real(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise PrivacyError(f"{name}={value!r} is not a number; give a float")
    return float(value)
