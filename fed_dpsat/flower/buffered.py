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


class Buffer(RoundKind):
    """Who is under way, and what arrived. Raises ``SettingError`` for sizes that cannot be."""

    def __init__(self, *, size: int, in_flight: int, staleness_exponent: float, seed: int) -> None:
        if not 1 <= size <= in_flight:
            raise SettingError("buffer_size", size, f"in [1, {in_flight}]", "as many arrive as are under way, at most")
        self.size, self.in_flight, self.staleness_exponent, self.seed = size, in_flight, staleness_exponent, seed
        self.flights: dict[int, Flight] = {}
        self._arriving: list[int] = []

    @classmethod
    def of(cls, config: RunConfig) -> Buffer | None:
        """As ``config`` says; None where rounds wait for their cohort."""
        if not config.buffer_size:
            return None
        return cls(
            size=config.buffer_size,
            in_flight=config.cohort_size,
            staleness_exponent=config.staleness_exponent,
            seed=config.seed,
        )

    def check(self, grid: Grid) -> None:
        """Its time is simulated."""
        if not seconds_of(grid):
            raise FederationError("buffer_size needs simulated delays, and no network; set it to 0 on a network")

    def cohort(self, roster: Roster, round: int, seconds: Seconds | None) -> tuple[list[int], dict[int, History]]:
        """Those who set out."""
        assert seconds  # check() has seen to it
        eligible, retiring = roster.eligible(round)
        return self.set_out(round, eligible, seconds), retiring

    def pass_time(self, lasting: Iterable[float]) -> None:
        """It passed when they set out, until the buffer was full."""

    def ask(self, round: Round, grid: Grid, timeout: float) -> Iterable[Message]:
        """Replies one by one, which arrive in other rounds."""
        return grid.send_and_receive(list(round.messages.values()), timeout=timeout)

    def aggregate(self, round: Round, replies: Iterable[Message]) -> Aggregate:  # type: ignore[override]
        """What is computed is kept until it arrives; what arrives moves the model of now."""
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
        return {**super().state_dict(), "buffer": {"now": self.now, "flights": flights}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where ``state_dict`` was called."""
        super().load_state_dict(state)
        self.flights = {
            client: Flight(**{**flight, "cargo": flight["cargo"] and Cargo(**flight["cargo"])})
            for client, flight in state["buffer"]["flights"].items()
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
