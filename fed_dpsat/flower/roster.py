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
from fed_dpsat.flower.nodes import FederationError, FederationOver
from fed_dpsat.step.noise import derive_generator, derive_key
from fed_dpsat.step.secure_noise import system_generator


class Roster:
    """Clients by their ``plans`` and the ``ledger``, both public: eligibility never depends on data.

    A plan gives the cost of a round, the budget, and the first round of a client. A client is left out once
    ``max_rounds_per_client`` rounds are charged to it, in the ``min_separation - 1`` rounds after one of its own, and
    for good once its next round would exceed its budget. With cyclic sampling there are ``min_separation`` groups, a
    client is in one by a hash of its own number, and a round is for one group. With ``secret_coins`` the seed does not
    tell which clients coins draw. ``tossed`` is the number of clients with a coin for the last cohort; None if cohorts
    have a fixed size.
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
        min_separation: int = 1,
        secret_coins: bool = False,
    ) -> None:
        self.secret_coins = secret_coins
        self.plans, self.ledger = plans, ledger
        self.delta, self.accountant = delta, accountant
        self.cohort_size, self.seed = cohort_size, seed
        self.client_sampling, self.min_clients = client_sampling, min_clients
        self.max_rounds_per_client, self.min_separation = max_rounds_per_client, min_separation
        self.retired: dict[int, int] = {}
        self.tossed: int | None = None
        self._first_rounds = np.array([plan.first_round for plan in plans], dtype=np.int64)
        self._groups = np.zeros(len(plans), dtype=np.int64)
        if client_sampling == "cyclic":
            self._groups[:] = [group_of(seed, client, min_separation) for client in range(len(plans))]
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
        if self.client_sampling != "fixed":
            self.tossed = len(eligible)
            coins = system_generator() if self.secret_coins else None
            rate = self.cohort_size * self._turns / len(self.plans)
            return toss_cohort(self.seed, round, eligible, rate, coins), retiring
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
        eligible = np.flatnonzero(active & self._has_turn(round) & self._keeps_promise(round))
        return eligible, retiring

    def population(self, round: int) -> list[int]:
        """All clients that have a coin in ``round``: each has joined the plan, a turn, and has not retired."""
        found: list[int] = np.flatnonzero(self._active & self._has_turn(round)).tolist()
        return found

    def check_promise(self, clients: Sequence[int], round: int) -> None:
        """Raise ``FederationError`` if ``round`` comes too early for one of ``clients``, or is one too many."""
        broken = np.array(clients, dtype=np.int64)[~self._keeps_promise(round)[list(clients)]]
        if broken.size:
            raise FederationError(
                f"client {broken[0]} was in {self._used[broken[0]]} of at most {self.max_rounds_per_client} rounds, "
                f"the last time in round {self._last[broken[0]]}, and round {round} is less than min_separation="
                f"{self.min_separation} later, or one too many; nothing is charged or sent"
            )

    def charged(self, clients: Sequence[int], round: int) -> None:
        """Count ``round``, which was drawn for ``clients`` and charged to them."""
        self._unchecked, self._spent_before = np.array(clients, dtype=np.int64), None
        self._used[self._unchecked] += 1
        self._last[self._unchecked] = round

    @property
    def _turns(self) -> int:
        """The number of groups that have a turn after each other."""
        return self.min_separation if self.client_sampling == "cyclic" else 1

    def _has_turn(self, round: int) -> NDArray[np.bool_]:
        """Which clients have joined, and are of the group of ``round``."""
        there: NDArray[np.bool_] = (self._first_rounds <= round) & (self._groups == round % self._turns)
        return there

    def _keeps_promise(self, round: int) -> NDArray[np.bool_]:
        """Which clients ``round`` comes late enough for, and is not one too many."""
        late = (round - self._last >= self.min_separation) | (self.min_separation == 1)
        kept: NDArray[np.bool_] = late & (self._used < self.max_rounds_per_client)
        return kept

    def paid_more(self, clients: NDArray[np.int64]) -> None:
        """Look at the budgets of ``clients`` again, which paid for something beside training."""
        self._unchecked, self._spent_before = np.union1d(self._unchecked, clients), None

    def _count(self, retired: Mapping[int, int], *, spent_before: int | None, used_before: int | None) -> None:
        self.retired = dict(retired)
        self._active[:] = True
        self._active[list(self.retired)] = False
        self._used = np.zeros(len(self.plans), dtype=np.int64)
        self._last = np.full(len(self.plans), -self.min_separation, dtype=np.int64)
        for counts, by_client in (
            (self._used, self.ledger.rounds_by_client(before=used_before)),
            (self._last, self.ledger.last_rounds(before=used_before)),
        ):
            for client, count in by_client.items():
                if client < len(self.plans):
                    counts[client] = count
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


def group_of(seed: int, client: int, groups: int) -> int:
    """The group of ``client``, from 0: a function of its own number, so no other client moves it."""
    return int.from_bytes(derive_key(seed, purpose="cohort", client=client)[:8], "little") % groups


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
