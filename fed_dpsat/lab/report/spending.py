"""Epsilon of each client after each round, from the ledger."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fed_dpsat.accounting.accountant import epsilons
from fed_dpsat.accounting.plans import read_table
from fed_dpsat.errors import InputError, RunError
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.run.numbers import spread_out
from fed_dpsat.run.result import Run
from fed_dpsat.run.statement import trusted_ledger

MAX_ROUNDS = 40
"""Largest number of rounds with a computed epsilon, enough for a curve."""


@dataclass(frozen=True, kw_only=True)
class Spending:
    """``epsilon[R, clients]`` after the charges of ``rounds[R]``, and ``budgets[clients]``, inf without a budget."""

    rounds: NDArray[np.int64]
    epsilon: NDArray[np.float64]
    budgets: NDArray[np.float64]


def read_spending(run: Run) -> Spending | None:
    """The spending of ``run``; None without charges. Raises ``InputError`` for an invalid ledger."""
    config, folder = run.config, RunFolder(run.path, resume=True)
    if not folder.ledger_path.exists():
        return None
    try:
        with trusted_ledger(folder) as ledger:
            last = max((line["round"] for line in run.rounds), default=0)
            if not ledger.head.charges:
                return None
            rounds = [1 + i for i in spread_out(max(last, 1), MAX_ROUNDS)]
            spent = np.zeros((len(rounds) + 1, config.num_clients))
            for row, round in enumerate(rounds, 1):
                histories = ledger.histories(before=round + 1)
                spent[row, list(histories)] = epsilons(histories.values(), config.delta, config.accountant)
    except RunError as error:
        raise InputError(str(error)) from None
    return Spending(rounds=np.array([0, *rounds]), epsilon=spent, budgets=read_budgets(run))


def read_budgets(run: Run) -> NDArray[np.float64]:
    """The budget of each client; inf without a budget, or if the table is missing."""
    try:
        targets = np.array([row.target_epsilon for row in read_table(run.config)])
    except InputError:
        targets = np.zeros(run.config.num_clients)
    return np.where(targets > 0, targets, np.inf)
