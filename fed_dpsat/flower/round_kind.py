"""What kinds of rounds differ in: who is asked, how long it takes, how messages become a model, what is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.serverapp import Grid

from fed_dpsat.accounting.event import History
from fed_dpsat.flower import sums
from fed_dpsat.flower.exchange import Exchange
from fed_dpsat.flower.grid import SimulationGrid
from fed_dpsat.flower.handover import Aggregate
from fed_dpsat.flower.roster import Roster

Seconds = Callable[[int, int], float]
"""Client and round to the simulated time between setting out and arriving."""


class RoundKind:
    """Ordinary rounds as it stands; another kind overrides what it does in another way.

    It is given a grid to send over with a round that is charged, and not before. ``now`` is simulated, in seconds.
    """

    hides = ""
    """Why the inner strategy can be shown no single reply, where that is so."""

    now = 0.0

    def check(self, grid: Grid) -> None:
        """Raise ``FederationError`` if ``grid`` cannot have such rounds."""

    def cohort(self, roster: Roster, round: int, seconds: Seconds | None) -> tuple[list[int], dict[int, History]]:
        """Who is asked in ``round``, ascending; and the retiring, as ``Roster.eligible`` has them."""
        return roster.cohort(round)

    def pass_time(self, lasting: Iterable[float]) -> None:
        """A round takes as long as its slowest client."""
        self.now += max(lasting, default=0.0)

    def train(self, exchange: Exchange, grid: Grid, timeout: float) -> Aggregate:
        """Send the messages and hand over what comes of them: a sum, made where replies are, if no more is needed."""
        messages, phases = list(exchange.messages.values()), exchange.phases
        if isinstance(grid, SimulationGrid) and sums.only_mean(exchange.handover.inner):
            parts = grid.add_up(messages, release_counts=exchange.handover.release_counts, timeout=timeout)
            with phases("aggregate"):
                return exchange.added_up(phases.waiting_for("train", parts))
        ask = grid.stream if isinstance(grid, SimulationGrid) else grid.send_and_receive
        with phases("train"):
            replies = ask(messages, timeout=timeout)
        with phases("aggregate"):
            return exchange.one_by_one(phases.waiting_for("train", replies))

    def state_dict(self) -> dict[str, Any]:
        """What it needs to go on after this round: entries of the strategy's ``state_dict``."""
        return {"simulated_seconds": self.now}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Find those entries in the strategy's ``state``."""
        self.now = state["simulated_seconds"]


def seconds_of(grid: Grid) -> Seconds | None:
    """How long clients take, where time is simulated."""
    return grid.seconds if isinstance(grid, SimulationGrid) else None
