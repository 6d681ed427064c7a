"""The rows of a ledger as cohorts: schema 1 has a row for each client, schema 2 a row for all that share a value."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np

from fed_dpsat.accounting import chain
from fed_dpsat.accounting.by_client import ByClient
from fed_dpsat.accounting.chain import EDITED, LedgerError
from fed_dpsat.accounting.event import PrivacyError, PrivacyEvent
from fed_dpsat.accounting.histories import Histories
from fed_dpsat.accounting.packed import Clients, unpack

LAST = 2**63 - 1
"""A round number above every round."""


def cohorts(
    connection: sqlite3.Connection, table: str, where: str = "1", values: tuple[int, ...] = ()
) -> Iterator[tuple[int, int, ByClient[Any]]]:
    """Round, attempt, and the columns after the key of each client, of the rows that a condition in SQL selects.

    Ascending. Raises ``LedgerError`` for a list of clients that is invalid, or has a client of another row of its
    round and attempt.
    """
    _, own = chain.COLUMNS[table].split("attempt, ")
    query = f"SELECT round, attempt, client, {own} FROM {table} WHERE {where} ORDER BY round, attempt"
    for (round, attempt), rows in groupby(connection.execute(query, values), key=lambda row: row[:2]):
        of_value: dict[tuple[object, ...], list[object]] = {}
        for _, _, stored, *value in rows:
            of_value.setdefault(tuple(value), []).append(stored)
        try:
            found = ByClient.of([(_joined(stored), value) for value, stored in of_value.items()])
        except ValueError as error:
            raise LedgerError(f"{table} of round {round}, attempt {attempt}: {error}; {EDITED}") from None
        yield round, attempt, found


def read_histories(connection: sqlite3.Connection, before: int = LAST) -> Histories:
    """The histories of the rounds below ``before``."""
    histories = Histories()
    for round, attempt, cohort in cohorts(connection, "charges", "round < ?", (before,)):
        try:
            histories.charge(cohort.map(_event))
        except PrivacyError as error:
            raise LedgerError(
                f"a charge of round {round}, attempt {attempt} is invalid ({error}); restore the ledger from a backup"
            ) from error
    return histories


def _joined(stored: list[object]) -> Clients:
    """The clients of some rows; single numbers are joined first, because a file of schema 1 has many."""
    if len(stored) == 1:
        return unpack(stored[0])
    single = np.array([one for one in stored if type(one) is int], dtype=np.int64)
    return np.concatenate([single, *(unpack(one) for one in stored if type(one) is not int)])


def _event(columns: tuple[Any, ...]) -> PrivacyEvent:
    kind, noise, rate, steps = columns
    return PrivacyEvent(kind=kind, noise_multiplier=noise, sample_rate=rate, steps=steps)
