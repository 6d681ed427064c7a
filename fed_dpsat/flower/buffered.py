"""Asynchronous rounds (FedBuff, Nguyen et al., AISTATS 2022, arXiv 2106.06639), in simulated time.

``in_flight`` clients are under way at a time. A round is a buffer of ``size`` arrivals: until it is full, who arrives
makes room for another client, that sets out with the model of this round. An update that set out ``s`` rounds ago goes
into the mean as ``(1 + s) ** -staleness_exponent`` times itself, added to the model of now.

Who sets out and who arrives follows from the seed and from simulated delays, which do not depend on data: so a client
that is charged when it sets out pays for all that it tells, and its releases compose whatever their order.

============================================ =====================================================
case                                         what happens
============================================ =====================================================
a client that fails, drops out or is late    arrives without an update; its place is free again
nobody left to set out                       fewer are under way; those that are still arrive
arrivals without any update                  the model stays as it is
a client that arrived in this round          sets out again in the next one at the earliest
============================================ =====================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from fed_dpsat.errors import SettingError
from fed_dpsat.flower import records
from fed_dpsat.noise import derive_generator
from fed_dpsat.params import Params, subtract

Seconds = Callable[[int, int], float]
"""Client and round to the simulated time between setting out and arriving."""


@dataclass(frozen=True, kw_only=True)
class Cargo:
    """A valid reply: how it differs from the model it set out with, and its records."""

    update: Params
    metrics: Mapping[str, Any]
    event: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A client under way since ``round``, that arrives at ``ready`` seconds; with ``cargo``, if it has any."""

    round: int
    ready: float
    cargo: Cargo | None = None


class Buffer:
    """Who is under way, and what arrived. Raises ``SettingError`` for sizes that cannot be."""

    def __init__(self, *, size: int, in_flight: int, staleness_exponent: float, seed: int) -> None:
        if not 1 <= size <= in_flight:
            raise SettingError("buffer_size", size, f"in [1, {in_flight}]", "as many arrive as are under way, at most")
        self.size, self.in_flight, self.staleness_exponent, self.seed = size, in_flight, staleness_exponent, seed
        self.now = 0.0
        self.flights: dict[int, Flight] = {}
        self._arriving: list[int] = []

    def set_out(self, round: int, eligible: Iterable[int] | NDArray[np.int64], seconds: Seconds) -> list[int]:
        """Clients that set out in ``round``, ascending. Time passes until the buffer is full or nobody is under way."""
        allowed = np.sort(np.array(list(eligible), dtype=np.int64))
        order = derive_generator(self.seed, purpose="cohort", round=round).permutation(allowed).tolist()
        waiting = [client for client in order if client not in self.flights]
        started: list[int] = []
        self._arriving = []
        while len(self._arriving) < self.size:
            while waiting and len(self.flights) - len(self._arriving) < self.in_flight:
                started.append(client := waiting.pop(0))
                self.flights[client] = Flight(round=round, ready=self.now + seconds(client, round))
            under_way = self.flights.keys() - set(self._arriving)
            if not under_way:
                break
            first = min(under_way, key=lambda client: (self.flights[client].ready, client))
            self.now = max(self.now, self.flights[first].ready)
            self._arriving.append(first)
        return sorted(started)

    def put(self, client: int, cargo: Cargo) -> None:
        """What ``client``, who is under way, will arrive with."""
        self.flights[client] = replace(self.flights[client], cargo=cargo)

    def arrive(self) -> dict[int, Flight]:
        """The clients whose arrival ends the round, ascending."""
        arriving, self._arriving = sorted(self._arriving), []
        return {client: self.flights.pop(client) for client in arriving}

    def share(self, staleness: int) -> float:
        """What an update that set out so many rounds ago is multiplied by."""
        return float((1 + staleness) ** -self.staleness_exponent)

    def state_dict(self) -> dict[str, Any]:
        """Between two rounds, as plain data."""
        flights = {c: {**vars(f), "cargo": f.cargo and dict(vars(f.cargo))} for c, f in self.flights.items()}
        return {"now": self.now, "flights": flights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where ``state_dict`` was called."""
        self.now = state["now"]
        self.flights = {
            client: Flight(**{**flight, "cargo": flight["cargo"] and Cargo(**flight["cargo"])})
            for client, flight in state["flights"].items()
        }


def cargo_of(content: RecordDict, model: Params) -> Cargo:
    """The valid reply ``content`` of a client that set out with ``model``."""
    return Cargo(
        update=subtract(records.to_params(content.array_records[records.ARRAYS]), model),
        metrics=dict(content.metric_records[records.METRICS]),
        event=dict(content.config_records[records.EVENT]),
    )


def moved(cargo: Cargo, model: Params, share: float) -> RecordDict:
    """The reply of a client that would have set out with ``model``, and come ``share`` of its way; integers stay."""
    arrays = {
        name: torch.add(p, cargo.update[name], alpha=share) if p.is_floating_point() else p for name, p in model.items()
    }
    return RecordDict(
        {
            records.ARRAYS: records.to_arrays(arrays),
            records.METRICS: MetricRecord(dict(cargo.metrics)),
            records.EVENT: ConfigRecord(dict(cargo.event)),
        }
    )
