"""The clients that a round may ask, and the cohort that it asks.

A round may ask a client that is connected, has joined the plan, and has rounds and budget left. A seeded generator
draws cohorts by partition, so that rates are the accounted ones. The work of a round depends on the size of its cohort,
not on the number of clients.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fed_dpsat.accounting.by_client import ByClient
from fed_dpsat.accounting.event import History
from fed_dpsat.accounting.ledger import PrivacyLedger
from fed_dpsat.accounting.plans import ClientPlan, affordable
from fed_dpsat.flower.nodes import FederationOver
from fed_dpsat.step.noise import derive_generator
from fed_dpsat.step.secure_noise import system_generator


class Roster:
    """Clients by their ``plans`` and the ``ledger``, both public: eligibility never depends on data.

    A plan gives the cost of a round, the budget, and the first round of a client. A client is left out once
    ``max_rounds_per_client`` rounds are charged to it, and for good once its next round would exceed its budget.
    With ``secret_coins`` the seed does not tell which clients coins draw. ``tossed`` is the number of clients with a
    coin for the last cohort; None if cohorts have a fixed size.
    """

    def __init__(
        self,
        plans: Sequence[ClientPlan],
        ledger: PrivacyLedger,
        *,
        delta: float,
        accountant: str,
        cohort_size: int,
        max_rounds_per_client: int,
        seed: int,
        client_sampling: str = "fixed",
        min_clients: int = 1,
        secret_coins: bool = False,
    ) -> None:
        self.secret_coins = secret_coins
        self.plans, self.ledger = plans, ledger
        self.delta, self.accountant = delta, accountant
        self.cohort_size, self.seed = cohort_size, seed
        self.client_sampling, self.min_clients = client_sampling, min_clients
        self.max_rounds_per_client = max_rounds_per_client
        self.retired: dict[int, int] = {}
        self.tossed: int | None = None
        self._first_rounds = np.array([plan.first_round for plan in plans], dtype=np.int64)
        self._there = np.zeros(len(plans), dtype=bool)
        self._active = np.ones(len(plans), dtype=bool)
        self._affordable: dict[tuple[History, ClientPlan], bool] = {}
        self._distinct_plans = ByClient.of(dict(enumerate(plans))).merged()
        self._count({}, spent_before=None, used_before=None)

    def begin_again(self, round: int, retired: Mapping[int, int], *, same_noise: bool) -> None:
        """Restore the state before ``round``, which may be charged in part and is repeated.

        With the ``same_noise`` the repetition is the same release and costs nothing; otherwise it is a second release.
        """
        self._count(retired, spent_before=round if same_noise else None, used_before=round)

    def join(self, clients: Iterable[int]) -> None:
        """Set the connected clients."""
        self._there[:] = False
        self._there[list(clients)] = True

    def cohort(self, round: int) -> tuple[list[int], dict[int, History]]:
        """The clients drawn for ``round`` from the eligible ones, ascending; and the retiring ones (``eligible``)."""
        eligible, retiring = self.eligible(round)
        if self.client_sampling == "poisson":
            self.tossed = len(eligible)
            coins = system_generator() if self.secret_coins else None
            return toss_cohort(self.seed, round, eligible, self.cohort_size / len(self.plans), coins), retiring
        return draw_cohort(self.seed, round, eligible, self.cohort_size), retiring

    def eligible(self, round: int) -> tuple[NDArray[np.int64], dict[int, History]]:
        """Clients that ``round`` may ask, ascending; and the clients that cannot afford it, with their histories.

        Raises ``FederationOver`` if fewer than ``min_clients`` have budget left.
        """
        retiring = self._retiring()
        self.retired |= dict.fromkeys(retiring, round)
        self._active[list(retiring)] = False
        self._unchecked = np.empty(0, dtype=np.int64)
        active = self._there & self._active
        if (left := int(active.sum())) < self.min_clients:
            raise FederationOver(
                f"{left} clients have budget left before round {round}, fewer than min_clients={self.min_clients}"
            )
        eligible = np.flatnonzero(active & (self._first_rounds <= round) & (self._used < self.max_rounds_per_client))
        return eligible, retiring

    def population(self, round: int) -> list[int]:
        """All clients that have a coin in ``round``: each has joined the plan and has not retired."""
        found: list[int] = np.flatnonzero(self._active & (self._first_rounds <= round)).tolist()
        return found

    def charged(self, clients: Sequence[int]) -> None:
        """Count the round that was drawn for ``clients``, which were charged for it."""
        self._unchecked, self._spent_before = np.array(clients, dtype=np.int64), None
        self._used[self._unchecked] += 1

    def paid_more(self, clients: NDArray[np.int64]) -> None:
        """Look at the budgets of ``clients`` again, which paid for something beside training."""
        self._unchecked, self._spent_before = np.union1d(self._unchecked, clients), None

    def _count(self, retired: Mapping[int, int], *, spent_before: int | None, used_before: int | None) -> None:
        self.retired = dict(retired)
        self._active[:] = True
        self._active[list(self.retired)] = False
        self._used = np.zeros(len(self.plans), dtype=np.int64)
        for client, rounds in self.ledger.rounds_by_client(before=used_before).items():
            if client < len(self.plans):
                self._used[client] = rounds
        self._unchecked, self._spent_before = np.arange(len(self.plans)), spent_before

    def _retiring(self) -> dict[int, History]:
        """The active clients among the unchecked ones that cannot afford a round, ascending."""
        clients = self._unchecked[self._active[self._unchecked]]
        histories = self.ledger.histories_of(clients, before=self._spent_before)
        plans = self._distinct_plans
        plans = ByClient(clients=histories.clients, which=plans.which[histories.clients], values=plans.values)
        found: dict[int, History] = {}
        for some, key in histories.paired(plans).groups():
            if key not in self._affordable:
                self._affordable[key] = affordable(*key, self.delta, self.accountant)
            if not self._affordable[key]:
                found |= dict.fromkeys(some.tolist(), key[0])
        return dict(sorted(found.items()))


def toss_cohort(
    seed: int,
    round: int,
    eligible: Collection[int] | NDArray[np.int64],
    rate: float,
    generator: np.random.Generator | None = None,
) -> list[int]:
    """The ``eligible`` clients whose own coin of probability ``rate`` draws them, ascending; may be empty.

    A ``generator`` replaces the one of the seed.
    """
    clients = _ascending(eligible)
    coins = (generator or derive_generator(seed, purpose="cohort", round=round)).random(len(clients))
    cohort: list[int] = clients[coins < rate].tolist()
    return cohort


def draw_cohort(seed: int, round: int, eligible: Collection[int] | NDArray[np.int64], size: int) -> list[int]:
    """``size`` of the ``eligible`` clients, uniformly without replacement, ascending; all if there are fewer."""
    clients = _ascending(eligible)
    if len(clients) > size:
        generator = derive_generator(seed, purpose="cohort", round=round)
        clients = np.sort(generator.choice(clients, size=size, replace=False, shuffle=False))
    cohort: list[int] = clients.tolist()
    return cohort


def _ascending(clients: Collection[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    return np.sort(clients if isinstance(clients, np.ndarray) else np.array(list(clients), dtype=np.int64))
