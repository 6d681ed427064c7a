"""The charges of every client, on disk before any release.

There is one charge per (client, round, attempt): a retried attempt is a second release and a second charge. Outcomes
are bookkeeping and never lower a charge. Clients hold disjoint data, so the epsilon of the federation is the maximum
over clients. ``storage`` and ``chain`` make the file durable and detect changes.

A call writes one row per distinct event or outcome, with all clients that share it.

========================== =====================================================================
case                       what happens
========================== =====================================================================
no charge yet              epsilon is 0
same key, equal event      no-op: charging again after a crash is safe
same key, another event    ``LedgerError``, nothing of the call is charged
an event of another unit   ``LedgerError``, nothing of the call is charged
more rounds of a client    ``LedgerError``, nothing of the call is charged
than a correlated event
was made for
a client in two pairs      ``LedgerError``, nothing of the call is charged
disk full                  ``LedgerError``, nothing of the call is charged
second writer              ``LedgerError`` when it opens; ``readonly=True`` reads meanwhile
edited, cut off, foreign   ``LedgerError`` when a writer opens it; a reader calls ``verify()``
========================== =====================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from fed_dpsat.accounting import chain, rows, storage
from fed_dpsat.accounting.accountant import epsilon, federation_epsilon
from fed_dpsat.accounting.by_client import AnyClients, ByClient, Given, Value, check_number, numbers
from fed_dpsat.accounting.chain import LedgerError
from fed_dpsat.accounting.event import UNITS, History, PrivacyEvent, unit_of
from fed_dpsat.accounting.histories import Histories
from fed_dpsat.accounting.packed import pack

EVALUATIONS = 2**32
"""The attempt from which those of evaluations are numbered."""
NOBODY: ByClient[Any] = ByClient.of([])


class Head(NamedTuple):
    """Number of charges and hash of the last one; a copy outside the file detects a rewritten file."""

    charges: int
    sha256: str


class PrivacyLedger:
    """The charges in the SQLite file at ``path``; a context manager.

    A writer (the default) creates a missing file. A resumed run sets ``must_exist``: if its ledger is lost, it must
    not start again from epsilon 0. A writer verifies the file first and stays the only writer until ``close``.
    ``":memory:"`` is for tests.

    Raises ``LedgerError`` if the file is invalid, or cannot be read or written.
    """

    def __init__(self, path: str | Path, *, readonly: bool = False, must_exist: bool = False) -> None:
        self.path = path if path == ":memory:" else Path(path).resolve()
        self.readonly = readonly
        self._histories = Histories()
        self._seen: tuple[int, bytes] | None = None  # head of the charges that the histories include
        with ExitStack() as resources:
            if isinstance(self.path, Path):
                if not readonly:
                    resources.enter_context(storage.lock(self.path))
                self._file = storage.open_file(self.path, readonly=readonly, must_exist=must_exist)
            else:
                self._file = storage.open_memory()
            resources.callback(self._file.close)
            if not readonly:
                self.verify()
            self._read(None)
            self._head = chain.head(self._file, "charges")
            self._resources = resources.pop_all()

    def charge(self, client: int, round: int, attempt: int, event: PrivacyEvent) -> None:
        """Charge one client; the charge is on disk when this returns."""
        self.charge_many(round, attempt, {client: event})

    def charge_many(self, round: int, attempt: int, events: Given[PrivacyEvent]) -> None:
        """Charge a cohort in one transaction, on disk when this returns; a ``LedgerError`` charges no client.

        ``events`` map each client to its event; or they are pairs of clients, in a collection or an array of ints,
        and their common event, as ``[(range(100), event)]``.
        """
        cohort = _cohort("charge", round, attempt, events).merged()
        charges = cohort.map(_columns)
        with self._writing():
            if chain.head(self._file, "charges") != self._head:
                raise LedgerError(f"another process wrote to {self.path}; stop it, then resume this run")
            self._check_unit(cohort.values)
            known = self._rows("charges", round, attempt)
            if (client := charges.conflict(known)) is not None:
                raise LedgerError(
                    f"{_key(client, round, attempt)} is charged already, with another event than "
                    f"{cohort.get(client)}; give a new release a new attempt"
                )
            self._check_participations(cohort.beyond(known))
            self._append("charges", round, attempt, charges.beyond(known))
            head = chain.head(self._file, "charges")
        self._seen = None  # an interrupt inside the loop must not lower epsilon
        self._head = head
        self._histories.charge(cohort.beyond(known))
        self._seen = head

    def settle(self, client: int, round: int, attempt: int, outcome: str) -> None:
        """Record the outcome of a charge: "released", "dropped: reason" or "failed: reason". The charge stays."""
        self.settle_many(round, attempt, {client: outcome})

    def settle_many(self, round: int, attempt: int, outcomes: Given[str]) -> None:
        """``settle`` for a cohort in one transaction; raises ``LedgerError`` for a client without a charge.

        ``outcomes`` map each client to its outcome, or are pairs as in ``charge_many``.
        """
        cohort = _cohort("settle", round, attempt, outcomes)
        for i, outcome in enumerate(cohort.values):
            if not isinstance(outcome, str) or not outcome:
                raise LedgerError(
                    f"outcome={outcome!r} of client {cohort.clients[cohort.which == i][0]} is not a text; give "
                    "'released', 'dropped: reason' or 'failed: reason'"
                )
        cohort = cohort.merged()
        with self._writing():
            missing = cohort.beyond(self._rows("charges", round, attempt)).clients
            if missing.size:
                raise LedgerError(
                    f"{_key(missing[0], round, attempt)} has no charge; charge a client before its release"
                )
            known = self._settled(round, attempt)
            if (client := cohort.conflict(known)) is not None:
                raise LedgerError(
                    f"{_key(client, round, attempt)} is settled already, as "
                    f"{known.get(client)!r}, not {cohort.get(client)!r}; outcomes are not changed"
                )
            self._append("outcomes", round, attempt, cohort.beyond(known).map(lambda outcome: (outcome,)))

    def histories(self, before: int | None = None) -> dict[int, History]:
        """Merged history of every charged client; with ``before``, of the rounds before that one."""
        return self._read(before).all().to_dict()

    def history(self, client: int) -> History:
        """Merged history of one client; empty without a charge."""
        return self._read(None).all().get(client) or ()

    def histories_of(self, clients: AnyClients, before: int | None = None) -> ByClient[History]:
        """Merged history of each of ``clients``, empty without a charge; ``groups()`` gives the clients of each one.

        ``before`` is as in ``histories``.
        """
        return self._read(before).of(np.unique(numbers(clients))).merged()

    def epsilon(self, delta: float, accountant: str = "pld") -> float:
        """Maximum over clients at ``delta``; one computation if all clients have the same history."""
        return federation_epsilon(self._read(None).distinct(), delta, accountant)

    def epsilon_by_client(self, delta: float, accountant: str = "pld") -> dict[int, float]:
        """Epsilon of every charged client; one computation per distinct history."""
        histories = self._read(None).all().merged()
        return histories.map(lambda history: epsilon(history, delta, accountant)).to_dict()

    def rounds_by_client(self, before: int | None = None) -> dict[int, int]:
        """Number of rounds with a charge, by client; with ``before``, of the rounds before that one.

        Charges before the first round (round 0), and of evaluations, are not counted.
        """
        charged = self._cohorts("charges", *_of_training(before))
        by_round = [
            np.unique(np.concatenate([cohort.clients for *_, cohort in attempts]))
            for _, attempts in groupby(charged, key=lambda found: found[0])
        ]
        clients, counts = np.unique(np.concatenate([np.empty(0, np.int64), *by_round]), return_counts=True)
        return dict(zip(clients.tolist(), counts.tolist(), strict=True))

    def last_rounds(self, before: int | None = None) -> dict[int, int]:
        """The last round with a charge, by client, of those that ``rounds_by_client`` counts."""
        found: dict[int, int] = {}
        for round, _, cohort in self._cohorts("charges", *_of_training(before)):
            found |= dict.fromkeys(cohort.clients.tolist(), round)
        return found

    def attempts(self, round: int, first: int = 0) -> dict[int, int]:
        """By client, the last charged attempt at ``round``; of training, or of evaluations with their ``first``."""
        found: dict[int, int] = {}
        where = "round = ? AND attempt BETWEEN ? AND ?"
        for _, attempt, cohort in self._cohorts("charges", where, round, first, first + EVALUATIONS - 1):
            found |= dict.fromkeys(cohort.clients.tolist(), attempt)
        return found

    def outcomes(self, round: int, attempt: int) -> dict[int, str]:
        """The settled outcomes, by client."""
        return self._settled(round, attempt).to_dict()

    def last_round(self, client: int) -> int:
        """The highest charged round of ``client``; -1 without a charge."""
        charged = self._cohorts("charges", "client = ? OR typeof(client) = 'blob'", client)
        return max((round for round, _, cohort in charged if client in cohort.clients), default=-1)

    def outcome(self, client: int, round: int, attempt: int) -> str | None:
        """The settled outcome; "" for a charge without an outcome, None without a charge."""
        if self._rows("charges", round, attempt).get(client) is None:
            return None
        return self._settled(round, attempt).get(client) or ""

    @property
    def privacy_unit(self) -> str | None:
        """The privacy unit of all charges, "example" or "client"; None without a charge."""
        with storage.explained(self.path, "read"):
            found = self._file.execute("SELECT kind FROM charges LIMIT 1").fetchone()
        return None if found is None else unit_of(found[0]) or str(found[0])

    @property
    def head(self) -> Head:
        """The head of the chain of charges; publish it with epsilon."""
        with storage.explained(self.path, "read"):
            charges, digest = chain.head(self._file, "charges")
        return Head(charges, digest.hex())

    def extends(self, head: Head) -> bool:
        """Whether ``head`` is a head in the past of this chain; an older copy of the file does not contain it."""
        query = "SELECT hash FROM charges WHERE seq = ?"  # the number of charges up to the row
        with storage.explained(self.path, "read"):
            found = self._file.execute(query, (head.charges,)).fetchone()
        return (found[0] if found else chain.GENESIS if head.charges == 0 else b"").hex() == head.sha256

    def check_extends(self, head: Head, when: str) -> None:
        """Raise ``LedgerError`` unless ``extends(head)``; ``when`` names the point of the run that stored ``head``."""
        if not self.extends(head):
            raise LedgerError(
                f"{self.path} does not hold the {head.charges} charges that were in it {when}: it is an older copy, or "
                "the ledger of another run; restore the right one"
            )

    def verify(self) -> None:
        """Read the whole file; raises ``LedgerError`` for a row, table or trigger that was changed."""
        with storage.explained(self.path, "verify"), storage.snapshot(self._file):
            storage.verify_file(self._file)

    def close(self) -> None:
        """Close the file and release the lock."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        if self.readonly:
            raise LedgerError(f"{self.path} was opened with readonly=True; open it without to write")
        with storage.transaction(self._file, self.path):
            storage.raise_version(self._file)
            yield

    def _append(self, table: str, round: int, attempt: int, columns: ByClient[tuple[object, ...]]) -> None:
        groups = columns.groups()
        chain.append(self._file, table, [(pack(clients), round, attempt, *values) for clients, values in groups])

    def _cohorts(self, table: str, where: str, *values: int) -> Iterator[tuple[int, int, ByClient[Any]]]:
        with storage.explained(self.path, "read"):
            yield from rows.cohorts(self._file, table, where, values)

    def _rows(self, table: str, round: int, attempt: int) -> ByClient[tuple[Any, ...]]:
        """By client, the columns after the key."""
        found = [cohort for *_, cohort in self._cohorts(table, "round = ? AND attempt = ?", round, attempt)]
        return found[0] if found else NOBODY

    def _settled(self, round: int, attempt: int) -> ByClient[str]:
        return self._rows("outcomes", round, attempt).map(lambda columns: str(columns[0]))

    def _read(self, before: int | None) -> Histories:
        """The histories of the rounds before ``before``; those of all, if it is None.

        All are read from the file again only if its head has changed: at the start, and for a reader.
        """
        with storage.explained(self.path, "read"):
            if before is not None:
                return rows.read_histories(self._file, before)
            head = chain.head(self._file, "charges")
            if head != self._seen:
                self._seen = None
                self._histories = rows.read_histories(self._file)
                self._seen = head
            return self._histories

    def _check_participations(self, cohort: ByClient[PrivacyEvent]) -> None:
        if not any(event.participations for event in cohort.values):
            return
        for clients, (history, event) in self._read(None).of(cohort.clients).paired(cohort).groups():
            steps = event.steps + sum(one.steps for one in history if one.kind == event.kind)
            if event.participations and steps > event.participations:
                raise LedgerError(
                    f"client {clients[0]} would take part {steps} times, and the noise of {event.kind} is for "
                    f"{event.participations}; nothing is charged"
                )

    def _check_unit(self, events: list[PrivacyEvent]) -> None:
        own = self.privacy_unit or ""
        units = {event.privacy_unit for event in events} | {own} - {""}
        if len(units) > 1:
            raise LedgerError(
                f"{self.path} protects {UNITS.get(own, 'nothing yet')}, and the charge is for "
                f"{' and '.join(sorted(units))}; the two have no common epsilon: start a run with a ledger of its own"
            )


def _of_training(before: int | None) -> tuple[str, int, int]:
    """The condition, in SQL, for charges of training in the rounds before ``before``, with its values."""
    return "round BETWEEN 1 AND ? AND attempt < ?", rows.LAST if before is None else before - 1, EVALUATIONS


def _cohort(doing: str, round: int, attempt: int, given: Given[Value]) -> ByClient[Value]:
    """``given`` for a valid key; raises ``LedgerError``."""
    try:
        check_number("round", round)
        check_number("attempt", attempt)
        return ByClient.of(given)
    except ValueError as error:
        raise LedgerError(
            f"cannot {doing}: {error}; number clients, rounds and attempts from 0, and give each client once"
        ) from None


def _key(client: int, round: int, attempt: int) -> str:
    return f"client={client}, round={round}, attempt={attempt}"


def _columns(event: PrivacyEvent) -> tuple[object, ...]:
    return event.kind, event.noise_multiplier, event.sample_rate, event.steps
