"""The charges of every client, on disk before any release.

There is one row per (client, round, attempt): a retried attempt is a second release and a second row. Outcomes are
bookkeeping and never lower a charge. Clients hold disjoint data, so the epsilon of the federation is the maximum over
clients. ``storage`` and ``chain`` make the file durable and detect changes.

========================== =====================================================================
case                       what happens
========================== =====================================================================
no charge yet              epsilon is 0
same key, equal event      no-op: charging again after a crash is safe
same key, another event    ``LedgerError``, nothing of the call is charged
an event of another unit   ``LedgerError``, nothing of the call is charged
disk full                  ``LedgerError``, nothing of the call is charged
second writer              ``LedgerError`` when it opens; ``readonly=True`` reads meanwhile
edited, cut off, foreign   ``LedgerError`` when a writer opens it; a reader calls ``verify()``
========================== =====================================================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from fed_dpsat.accounting import chain, storage
from fed_dpsat.accounting.accountant import epsilon, federation_epsilon
from fed_dpsat.accounting.chain import LedgerError
from fed_dpsat.accounting.event import KINDS, UNITS, History, PrivacyEvent, merge


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
        self._histories: dict[int, History] = {}
        self._clients: Counter[History] = Counter()  # number of clients with each history
        self._seen: tuple[int, bytes] | None = None  # head of the charges that the two attributes above include
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
            self._refresh()
            self._head = chain.head(self._file, "charges")
            self._resources = resources.pop_all()

    def charge(self, client: int, round: int, attempt: int, event: PrivacyEvent) -> None:
        """Charge one client; the charge is on disk when this returns."""
        self.charge_many(round, attempt, {client: event})

    def charge_many(self, round: int, attempt: int, events: Mapping[int, PrivacyEvent]) -> None:
        """Charge a cohort in one transaction, on disk when this returns; a ``LedgerError`` charges no client."""
        self._check_key("charge", round, attempt, events)
        memo: dict[tuple[History, PrivacyEvent], History] = {}
        with self._writing():
            if chain.head(self._file, "charges") != self._head:
                raise LedgerError(f"another process wrote to {self.path}; stop it, then resume this run")
            self._check_unit(events.values())
            known = self._rows("charges", round, attempt)
            new: dict[int, PrivacyEvent] = {}
            for client, event in sorted(events.items()):
                if client not in known:
                    new[client] = event
                elif known[client] != _columns(event):
                    raise LedgerError(
                        f"{_key(client, round, attempt)} is charged already, with another event than "
                        f"{event}; give a new release a new attempt"
                    )
            chain.append(
                self._file, "charges", [(client, round, attempt, *_columns(event)) for client, event in new.items()]
            )
            head = chain.head(self._file, "charges")
        self._seen = None  # an interrupt inside the loop must not lower epsilon
        self._head = head
        for client, event in new.items():
            before = self._histories.get(client, ())
            if (before, event) not in memo:
                memo[before, event] = merge([*before, event])
            self._set_history(client, memo[before, event])
        self._seen = head

    def settle(self, client: int, round: int, attempt: int, outcome: str) -> None:
        """Record the outcome of a charge: "released", "dropped: reason" or "failed: reason". The charge stays."""
        self.settle_many(round, attempt, {client: outcome})

    def settle_many(self, round: int, attempt: int, outcomes: Mapping[int, str]) -> None:
        """``settle`` for a cohort in one transaction; raises ``LedgerError`` for a client without a charge."""
        self._check_key("settle", round, attempt, outcomes)
        with self._writing():
            charged = self._rows("charges", round, attempt)
            known = self._rows("outcomes", round, attempt)
            new = []
            for client, outcome in sorted(outcomes.items()):
                if not isinstance(outcome, str) or not outcome:
                    raise LedgerError(
                        f"outcome={outcome!r} of client {client} is not a text; give "
                        "'released', 'dropped: reason' or 'failed: reason'"
                    )
                if client not in charged:
                    raise LedgerError(
                        f"{_key(client, round, attempt)} has no charge; charge a client before its release"
                    )
                if client not in known:
                    new.append((client, round, attempt, outcome))
                elif known[client] != (outcome,):
                    raise LedgerError(
                        f"{_key(client, round, attempt)} is settled already, as "
                        f"{known[client][0]!r}, not {outcome!r}; outcomes are not changed"
                    )
            chain.append(self._file, "outcomes", new)

    def histories(self, before: int | None = None) -> dict[int, History]:
        """Merged history of every charged client; with ``before``, of the rounds before that one."""
        if before is not None:
            with storage.explained(self.path, "read"):
                return dict(storage.read_histories(self._file, before))
        self._refresh()
        return dict(self._histories)

    def history(self, client: int) -> History:
        """Merged history of one client; empty without a charge."""
        self._refresh()
        return self._histories.get(client, ())

    def epsilon(self, delta: float, accountant: str = "pld") -> float:
        """Maximum over clients at ``delta``; one computation if all clients have the same history."""
        self._refresh()
        return federation_epsilon(self._clients, delta, accountant)

    def epsilon_by_client(self, delta: float, accountant: str = "pld") -> dict[int, float]:
        """Epsilon of every charged client; one computation per distinct history."""
        self._refresh()
        spent = {history: epsilon(history, delta, accountant) for history in self._clients}
        return {client: spent[history] for client, history in self._histories.items()}

    def rounds_by_client(self, before: int | None = None) -> dict[int, int]:
        """Number of rounds with a charge, by client; with ``before``, of the rounds before that one."""
        query = "SELECT client, COUNT(DISTINCT round) FROM charges WHERE round < ? GROUP BY client ORDER BY client"
        with storage.explained(self.path, "read"):
            return dict(self._file.execute(query, (storage.LAST if before is None else before,)))

    def attempts(self, round: int) -> dict[int, int]:
        """By client, the last charged attempt at ``round``."""
        query = "SELECT client, MAX(attempt) FROM charges WHERE round = ? GROUP BY client"
        with storage.explained(self.path, "read"):
            return dict(self._file.execute(query, (round,)))

    def outcomes(self, round: int, attempt: int) -> dict[int, str]:
        """The settled outcomes, by client."""
        with storage.explained(self.path, "read"):
            return {client: str(outcome) for client, (outcome,) in self._rows("outcomes", round, attempt).items()}

    def last_round(self, client: int) -> int:
        """The highest charged round of ``client``; -1 without a charge."""
        with storage.explained(self.path, "read"):
            found = self._file.execute("SELECT MAX(round) FROM charges WHERE client = ?", (client,)).fetchone()[0]
        return -1 if found is None else int(found)

    def outcome(self, client: int, round: int, attempt: int) -> str | None:
        """The settled outcome; "" for a charge without an outcome, None without a charge."""
        with storage.explained(self.path, "read"):
            if client not in self._rows("charges", round, attempt):
                return None
            found = self._rows("outcomes", round, attempt).get(client, ("",))[0]
        return str(found)

    @property
    def privacy_unit(self) -> str | None:
        """The privacy unit of all charges, "example" or "client"; None without a charge."""
        with storage.explained(self.path, "read"):
            found = self._file.execute("SELECT kind FROM charges LIMIT 1").fetchone()
        return None if found is None else KINDS.get(found[0], found[0])

    @property
    def head(self) -> Head:
        """The head of the chain of charges; publish it with epsilon."""
        with storage.explained(self.path, "read"):
            rows, digest = chain.head(self._file, "charges")
        return Head(rows, digest.hex())

    def extends(self, head: Head) -> bool:
        """Whether ``head`` is a head in the past of this chain; an older copy of the file does not contain it."""
        query = "SELECT hash FROM charges WHERE seq = ?"
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
            yield

    def _rows(self, table: str, round: int, attempt: int) -> dict[int, tuple[object, ...]]:
        """By client, the columns after the key."""
        columns = ", ".join(chain.COLUMNS[table].split(", ")[3:])
        query = f"SELECT client, {columns} FROM {table} WHERE round = ? AND attempt = ?"
        return {client: tuple(values) for client, *values in self._file.execute(query, (round, attempt))}

    def _refresh(self) -> None:
        """Read all histories from the file if its head has changed: at the start, and for a reader."""
        with storage.explained(self.path, "read"):
            head = chain.head(self._file, "charges")
            if head == self._seen:
                return
            self._seen = None
            self._histories.clear()
            self._clients.clear()
            for client, history in storage.read_histories(self._file):
                self._set_history(client, history)
        self._seen = head

    def _set_history(self, client: int, history: History) -> None:
        before = self._histories.get(client)
        if before is not None:
            self._clients[before] -= 1
            if not self._clients[before]:
                del self._clients[before]
        self._clients[history] += 1
        self._histories[client] = history

    def _check_unit(self, events: Iterable[PrivacyEvent]) -> None:
        own = self.privacy_unit or ""
        units = {event.privacy_unit for event in events} | {own} - {""}
        if len(units) > 1:
            raise LedgerError(
                f"{self.path} protects {UNITS.get(own, 'nothing yet')}, and the charge is for "
                f"{' and '.join(sorted(units))}; the two have no common epsilon: start a run with a ledger of its own"
            )

    def _check_key(self, doing: str, round: int, attempt: int, clients: Mapping[int, object]) -> None:
        for name, number in [("round", round), ("attempt", attempt), *(("client", key) for key in clients)]:
            if type(number) is not int or not 0 <= number < 2**63:
                raise LedgerError(
                    f"cannot {doing}: {name}={number!r} is not an int in [0, 2**63); number "
                    "clients, rounds and attempts from 0"
                )


def _key(client: int, round: int, attempt: int) -> str:
    return f"client={client}, round={round}, attempt={attempt}"


def _columns(event: PrivacyEvent) -> tuple[object, ...]:
    return event.kind, event.noise_multiplier, event.sample_rate, event.steps
