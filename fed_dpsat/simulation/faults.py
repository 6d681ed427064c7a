"""Simulated faults: clients that drop out or reply late, drawn from the seed of the run.

A client that drops out does nothing. A client with a delay above ``client_timeout`` trains, and the simulation drops
its reply. The simulation does not sleep. Both clients stay charged, because a server cannot know whether a reply left
a device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.noise import derive_generator


@dataclass(frozen=True)
class Faults:
    """The faults of ``config``; a lognormal delay has sigma 1, and ``delay_mean`` is in seconds."""

    config: RunConfig

    @classmethod
    def of(cls, config: RunConfig) -> Faults | None:
        """The faults of ``config``; None without faults."""
        return cls(config) if config.dropout_rate or config.delay != "none" else None

    def drops_out(self, client: int, round: int) -> bool:
        """Whether ``client`` drops out of ``round``."""
        return bool(self._draw(client, round)[0] < self.config.dropout_rate)

    def seconds(self, client: int, round: int) -> float:
        """The delay of the reply of ``client`` in ``round``, in seconds."""
        _, exponential, normal = self._draw(client, round)
        if self.config.delay == "exponential":
            return self.config.delay_mean * exponential
        return self.config.delay_mean * math.exp(normal - 0.5) if self.config.delay == "lognormal" else 0.0

    def waited(self, client: int, round: int) -> float:
        """Seconds until the server receives the reply of ``client`` in ``round``, or stops waiting."""
        return min(self.seconds(client, round), self.config.client_timeout or math.inf)

    def comes_late(self, client: int, round: int) -> bool:
        """Whether the reply of ``client`` in ``round`` comes after ``client_timeout``; never for 0."""
        return bool(self.config.client_timeout and self.seconds(client, round) > self.config.client_timeout)

    def _draw(self, client: int, round: int) -> tuple[float, float, float]:
        generator = derive_generator(self.config.seed, purpose="faults", client=client, round=round)
        return generator.random(), generator.standard_exponential(), generator.standard_normal()
