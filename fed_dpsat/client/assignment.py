"""The assignment of a client for one round: the work, and the event that the work costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.accounting.plans import ClientPlan, LocalTraining, check_training

OWN = ("round", "attempt")
LOCAL = {"local_sample_rate": "sample_rate", "local_steps": "local_steps"}
"""Keys of a record under the unit "client", with the fields of ``LocalTraining``."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """One round of one client. The ledger charges its ``event``, the client runs it, and the reply has to name it.

    Under the unit "example" each local step is a release, and ``event`` describes the whole work. Under the unit
    "client" the server releases once per round, and ``training`` describes the work of the client before. Raises
    ``SettingError`` for an event of one unit with the work of the other.
    """

    round: int
    event: PrivacyEvent
    attempt: int = 0
    training: LocalTraining | None = None

    def __post_init__(self) -> None:
        check_training(self.event, self.training)

    @classmethod
    def of(cls, plan: ClientPlan, *, round: int, attempt: int = 0) -> Assignment:
        """A round of ``plan``."""
        return cls(round=round, attempt=attempt, event=plan.event, training=plan.training)

    @property
    def sample_rate(self) -> float:
        """Chance of each example to be in the batch of a local step."""
        return self.training.sample_rate if self.training else self.event.sample_rate

    @property
    def local_steps(self) -> int:
        """Steps of local training."""
        return self.training.local_steps if self.training else self.event.steps

    @property
    def local_noise_multiplier(self) -> float:
        """Noise of each local step; 0 under the unit "client", where the server adds it."""
        return 0.0 if self.training else self.event.noise_multiplier

    def to_dict(self) -> dict[str, float | int | str]:
        """A flat dict of scalars, for a Flower ``ConfigRecord``."""
        local = asdict(self.training) if self.training else {}
        own = {name: getattr(self, name) for name in OWN}
        return {**own, **self.event.to_dict(), **{key: local[name] for key, name in LOCAL.items() if local}}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Assignment:
        """The assignment from ``to_dict``; ``ValueError`` for a key or a type that ``to_dict`` never returns."""
        rest = dict(record)
        own = {name: rest.pop(name, None) for name in OWN}
        if wrong := [name for name, value in own.items() if type(value) is not int]:
            raise ValueError(f"{wrong[0]}={own[wrong[0]]!r} is not a whole number")
        local = {name: rest.pop(key) for key, name in LOCAL.items() if key in rest}
        training = None
        if local:
            if {name: type(value) for name, value in local.items()} != {"sample_rate": float, "local_steps": int}:
                raise ValueError(f"{', '.join(LOCAL)} are not a float and an int")
            training = LocalTraining(**local)
        return cls(event=PrivacyEvent.from_dict(rest), training=training, **own)
