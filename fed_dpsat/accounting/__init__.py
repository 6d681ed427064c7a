"""What the releases of a run cost: events, accountants, calibration and the ledger.

Unit: what an event's kind says, one example or one whole client, add-or-remove adjacency. Loads neither torch, Flower
nor Ray.
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
