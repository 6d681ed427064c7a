"""Asynchronous rounds (FedBuff, Nguyen et al., AISTATS 2022, arXiv 2106.06639), in simulated time.

``in_flight`` clients train at a time. A round is a buffer of ``size`` arrivals: until it is full, each client that
arrives makes room for another one, which starts from the model of this round. An update that started ``s`` rounds ago
enters the mean scaled by ``(1 + s) ** -staleness_exponent``, and is added to the current model.

The seed and the simulated delays decide which clients start and arrive, and neither depends on data. So the charge at
the start of a client covers its whole update, and its releases compose in any order.

============================================ =====================================================
case                                         what happens
============================================ =====================================================
a client that fails, drops out or is late    arrives without an update; its place is free again
no client left to start                      fewer clients train; each of them still arrives
arrivals without any update                  the model does not change
a client that arrived in this round          starts again in the next round at the earliest
============================================ =====================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fed_dpsat.accounting.event import History
from fed_dpsat.errors import SettingError
from fed_dpsat.flower.nodes import FederationError
from fed_dpsat.flower.roster import Roster
from fed_dpsat.flower.round import Aggregate, Round, RoundKind, Seconds, seconds_of
from fed_dpsat.flower.wire import records
from fed_dpsat.params import Params, subtract
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.noise import derive_generator


@dataclass(frozen=True, kw_only=True)
class Cargo:
    """A valid reply: its difference from the model that the client started from, and its records."""

    update: Params
    metrics: Mapping[str, Any]
    event: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A client that started in ``round`` and arrives at ``ready`` seconds, with ``cargo`` if its reply is valid."""

    round: int
    ready: float
    cargo: Cargo | None = None


class Buffer(RoundKind):
    """The clients that train, and their arrivals. Raises ``SettingError`` for impossible sizes."""

    def __init__(self, *, size: int, in_flight: int, staleness_exponent: float, seed: int) -> None:
        if not 1 <= size <= in_flight:
            raise SettingError("buffer_size", size, f"in [1, {in_flight}]", "as many arrive as are under way, at most")
        self.size, self.in_flight, self.staleness_exponent, self.seed = size, in_flight, staleness_exponent, seed
        self.flights: dict[int, Flight] = {}
        self._arriving: list[int] = []

    @classmethod
    def of(cls, config: RunConfig) -> Buffer | None:
        """The buffer of ``config``; None if rounds wait for their cohort."""
        if not config.buffer_size:
            return None
        return cls(
            size=config.buffer_size,
            in_flight=config.cohort_size,
            staleness_exponent=config.staleness_exponent,
            seed=config.seed,
        )

    def check(self, grid: Grid) -> None:
        """Raise ``FederationError`` on a network, which has no simulated time."""
        if not seconds_of(grid):
            raise FederationError("buffer_size needs simulated delays, and no network; set it to 0 on a network")

    def cohort(self, roster: Roster, round: int, seconds: Seconds | None) -> tuple[list[int], dict[int, History]]:
        """The clients that start."""
        assert seconds  # by check()
        eligible, retiring = roster.eligible(round)
        return self.set_out(round, eligible, seconds), retiring

    def pass_time(self, lasting: Iterable[float]) -> None:
        """Nothing: ``set_out`` advances the time until the buffer is full."""

    def ask(self, round: Round, grid: Grid, timeout: float) -> Iterable[Message]:
        """Single replies, because each arrives in a round of its own."""
        return grid.send_and_receive(list(round.messages.values()), timeout=timeout)

    def aggregate(self, round: Round, replies: Iterable[Message]) -> Aggregate:  # type: ignore[override]
        """Keep each update until its client arrives; add the updates that arrive to the current model."""
        valid, _ = round.judged(replies)
        model = records.to_params(round.model)
        for client, reply in valid.items():
            self.put(client, cargo_of(reply.content, model))
        arrived = self.arrive()
        round.report.arrived = stale = {client: round.number - flight.round for client, flight in arrived.items()}
        moves, metrics = {}, {}
        for client, flight in arrived.items():
            if flight.cargo is not None:
                content = moved(flight.cargo, model, self.share(stale[client]))
                moves[client] = Message(content, reply_to=round.directory.question(client))
                metrics[client] = flight.cargo.metrics
        return round.hand_over(list(arrived), moves, metrics)

    def set_out(self, round: int, eligible: Iterable[int] | NDArray[np.int64], seconds: Seconds) -> list[int]:
        """Clients that start in ``round``, ascending. Advances time until the buffer is full or no client trains."""
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
        """Keep ``cargo`` until ``client`` arrives."""
        self.flights[client] = replace(self.flights[client], cargo=cargo)

    def arrive(self) -> dict[int, Flight]:
        """The clients whose arrivals fill the buffer, ascending; they leave it."""
        arriving, self._arriving = sorted(self._arriving), []
        return {client: self.flights.pop(client) for client in arriving}

    def share(self, staleness: int) -> float:
        """The factor of an update that started ``staleness`` rounds ago."""
        return float((1 + staleness) ** -self.staleness_exponent)

    def state_dict(self) -> dict[str, Any]:
        """The state between two rounds, as plain data."""
        flights = {c: {**vars(f), "cargo": f.cargo and dict(vars(f.cargo))} for c, f in self.flights.items()}
        return {**super().state_dict(), "buffer": {"now": self.now, "flights": flights}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        super().load_state_dict(state)
        self.flights = {
            client: Flight(**{**flight, "cargo": flight["cargo"] and Cargo(**flight["cargo"])})
            for client, flight in state["buffer"]["flights"].items()
        }


def cargo_of(content: RecordDict, model: Params) -> Cargo:
    """The cargo of the valid reply ``content`` of a client that started from ``model``."""
    return Cargo(
        update=subtract(records.to_params(content.array_records[records.ARRAYS]), model),
        metrics=dict(content.metric_records[records.METRICS]),
        event=dict(content.config_records[records.EVENT]),
    )


def moved(cargo: Cargo, model: Params, share: float) -> RecordDict:
    """``cargo`` as a reply that starts from ``model`` and has ``share`` of its update; integers do not change."""
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
