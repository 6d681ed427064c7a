"""The privacy cost of a run: events, accountants, calibration and the ledger.

The kind of an event states its privacy unit: one example or one whole client, add-or-remove adjacency. This package
imports neither torch, Flower nor Ray.
"""

from fed_dpsat.accounting.accountant import epsilon, epsilons, large_delta
from fed_dpsat.accounting.calibration import EpsilonRow, epsilon_table, noise_multiplier_for
from fed_dpsat.accounting.chain import LedgerError
from fed_dpsat.accounting.event import PrivacyError, PrivacyEvent, merge
from fed_dpsat.accounting.ledger import PrivacyLedger

__all__ = [
    "EpsilonRow",
    "LedgerError",
    "PrivacyError",
    "PrivacyEvent",
    "PrivacyLedger",
    "epsilon",
    "epsilon_table",
    "epsilons",
    "large_delta",
    "merge",
    "noise_multiplier_for",
]
