"""What one release cost, as data; a history is a sorted tuple of such events.

The kind of an event says its unit of privacy: one example of one client, or one whole client; add-or-remove adjacency
for both. Events of two units have no common epsilon.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from fed_dpsat.errors import InputError

if TYPE_CHECKING:
    from dp_accounting import DpEvent  # type: ignore[import-untyped]

KINDS = {"poisson_gaussian": "example", "poisson_gaussian_clients": "client"}
"""Each kind of event with its unit."""

UNITS = {
    "example": "one example of one client, add-or-remove; maximum over clients",
    "client": "one whole client with all its examples, add-or-remove; maximum over clients",
}
"""What each unit protects, as it is printed."""

CLIENTS = "poisson_gaussian_clients"
MAX_STEPS = 2**40


class PrivacyError(InputError):
    """A number that no privacy statement can be made from; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class PrivacyEvent:
    """``steps`` Gaussian releases, each of a fresh Poisson sample of one client's examples, or of the clients.

    ================ ============ =====================================================================
    field            unit, bound  meaning
    ================ ============ =====================================================================
    noise_multiplier >= 0, finite std of the noise on the clipped SUM over clip_norm; 0 costs epsilon = inf
    sample_rate      (0, 1]       chance of each example (client) to be in a sum; 1 is no sampling at all
    steps            >= 1         releases; an empty batch (round) is one too
    kind             ``KINDS``    which mechanism, and what it protects; its own composition rule
    ================ ============ =====================================================================

    Raises ``PrivacyError`` where it is made, so that an event in hand is a valid one.
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
            raise PrivacyError(f"steps={self.steps!r} is not a whole number; count the releases")
        if not 1 <= self.steps <= MAX_STEPS:
            raise PrivacyError(f"steps={self.steps} is not in [1, 2**40]; where nothing was released, make no event")
        if self.kind not in KINDS:
            raise PrivacyError(
                f"kind={self.kind!r} is not one of {', '.join(KINDS)}; upgrade fed_dpsat if a newer one wrote it"
            )
        object.__setattr__(self, "noise_multiplier", noise + 0.0)  # -0.0 becomes 0.0: one form per value
        object.__setattr__(self, "sample_rate", rate)
        object.__setattr__(self, "steps", int(self.steps))

    @property
    def unit(self) -> str:
        """What it protects: "example" or "client"."""
        return KINDS[self.kind]

    def to_dp_event(self) -> DpEvent:
        """The same cost in dp_accounting's words: what an outside accountant would be given."""
        import dp_accounting

        if self.noise_multiplier == 0:
            return dp_accounting.NonPrivateDpEvent()
        release = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        if self.sample_rate < 1:
            release = dp_accounting.PoissonSampledDpEvent(self.sample_rate, release)
        return dp_accounting.SelfComposedDpEvent(release, self.steps)

    def to_dict(self) -> dict[str, float | int | str]:
        """A flat dict of scalars, as a Flower ``ConfigRecord`` carries it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> PrivacyEvent:
        """The event that ``to_dict`` gave; ``PrivacyError`` for a key or a type that it never gives."""
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
    """The canonical history: equal releases become one event with summed steps, sorted.

    The order of composition does not matter to any accountant, so two histories that cost the same by that
    argument compare and hash equal.
    """
    steps: dict[tuple[str, float, float], int] = {}
    for event in events:
        release = (event.kind, event.noise_multiplier, event.sample_rate)
        steps[release] = steps.get(release, 0) + event.steps
    return tuple(
        PrivacyEvent(kind=kind, noise_multiplier=noise, sample_rate=rate, steps=count)
        for (kind, noise, rate), count in sorted(steps.items())
    )


def unit_of(histories: Iterable[History]) -> str | None:
    """The one unit of all events in ``histories``, None without events; ``PrivacyError`` for two."""
    units = {event.unit for history in histories for event in history}
    if len(units) > 1:
        raise PrivacyError(
            f"events of the units {' and '.join(sorted(units))} have no common epsilon; account for each alone"
        )
    return next(iter(units), None)


def dominant(histories: Iterable[History]) -> list[History]:
    """Those of ``histories`` (merged ones) that no other costs at least as much as, event by event.

    An event costs no more than another of its kind with at most its noise and at least its rate and steps:
    more noise and fewer steps are post-processing and composition, a lower rate is sampling again. So the
    maximum of epsilon over clients is the maximum over these few: with one noise for all, the client with
    the highest rate. Only histories with as many events are compared: what is kept may be too much, never
    too little.
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
