"""Conformance suites: the author of a plug-in tests it in one line.

======================= ========================================== =====================================
suite                   takes                                      tests that
======================= ========================================== =====================================
``check_clipping``      ``clip_norm -> ClippingRule``              no example adds more than clip_norm
``check_mechanism``     the factory of a mechanism                 each step has noise of declared size
``check_noise``         ``num_steps -> mechanism``                 correlated noise is linear, and its bound
``check_optimizer``     ``() -> PrivateOptimizer``                 it post-processes, without hidden state
``check_model``         ``() -> nn.Module`` and an input shape     examples do not mix
``check_dataset``       ``() -> Dataset``                          it is finite, repeatable, and split
``check_partition``     ``(labels, num_clients, seed) -> parts``   clients share no example
``check_accountant``    ``(events, delta) -> epsilon``             epsilon is never too small
``check_strategy``      ``() -> flwr Strategy``                    replies, charges, a client's half
======================= ========================================== =====================================

A suite runs small named checks with fixed seeds, in seconds, and returns their names. The first failure raises
``ConformanceError``, an ``AssertionError`` with the check, the expected and the observed value, and a remedy.
Only ``check_strategy`` loads Flower, when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fed_dpsat.testing.accountant import check_accountant
from fed_dpsat.testing.clipping import check_clipping
from fed_dpsat.testing.conformance import ConformanceError
from fed_dpsat.testing.correlated import check_noise
from fed_dpsat.testing.dataset import check_dataset
from fed_dpsat.testing.mechanism import check_mechanism
from fed_dpsat.testing.model import check_model
from fed_dpsat.testing.optimizer import check_optimizer
from fed_dpsat.testing.partition import check_partition

if TYPE_CHECKING:
    from fed_dpsat.testing.strategy import check_strategy

__all__ = [
    "ConformanceError",
    "check_accountant",
    "check_clipping",
    "check_dataset",
    "check_mechanism",
    "check_model",
    "check_noise",
    "check_optimizer",
    "check_partition",
    "check_strategy",
]


def __getattr__(name: str) -> object:
    if name != "check_strategy":
        raise AttributeError(f"module 'fed_dpsat.testing' has no attribute {name!r}")
    return importlib.import_module("fed_dpsat.testing.strategy").check_strategy
