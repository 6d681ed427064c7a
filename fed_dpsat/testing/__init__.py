"""Conformance suites: what a plug-in's author runs on their own code, in one line of a test.

======================= ========================================== =====================================
suite                   takes                                      promises
======================= ========================================== =====================================
``check_clipping``      ``clip_norm -> ClippingRule``              no example adds more than clip_norm
``check_mechanism``     the factory of a mechanism                 noise of the declared size, each step
``check_optimizer``     ``() -> PrivateOptimizer``                 post-processing, and nothing hidden
``check_model``         ``() -> nn.Module`` and an input shape     examples do not mix
``check_dataset``       ``() -> Dataset``                          finite, repeatable, test is not train
``check_partition``     ``(labels, num_clients, seed) -> parts``   clients share no example
``check_accountant``    ``(events, delta) -> epsilon``             never below what was spent
``check_strategy``      ``() -> flwr Strategy``                    no reply spreads, no charge is missed
======================= ========================================== =====================================

A suite runs small named checks with fixed seeds, in seconds, and returns their names. The first that fails
raises ``ConformanceError``, an ``AssertionError``: which check, what was expected, what was seen, what to do.
``check_strategy`` alone loads Flower, and only when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fed_dpsat.testing.accountant import check_accountant
from fed_dpsat.testing.clipping import check_clipping
from fed_dpsat.testing.conformance import ConformanceError
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
    "check_optimizer",
    "check_partition",
    "check_strategy",
]


def __getattr__(name: str) -> object:
    if name != "check_strategy":
        raise AttributeError(f"module 'fed_dpsat.testing' has no attribute {name!r}")
    return importlib.import_module("fed_dpsat.testing.strategy").check_strategy
