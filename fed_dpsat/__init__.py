"""Private federated learning with client-side DP-SAT.

What is exported here is what README.md and docs/ explain; everything else may change without notice. Names are
resolved when they are used, so that ``import fed_dpsat.mechanism`` loads neither Flower nor Ray.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "DPSAT": "fed_dpsat.optimizers",
    "DPSGD": "fed_dpsat.optimizers",
    "DPSATMomentum": "fed_dpsat.optimizers",
    "FlatClipping": "fed_dpsat.clipping",
    "GaussianMechanism": "fed_dpsat.mechanism",
    "ModelLoss": "fed_dpsat.per_example",
    "PoissonSampler": "fed_dpsat.sampling",
    "PrivacyEvent": "fed_dpsat.privacy",
    "PrivacyLedger": "fed_dpsat.privacy",
    "RunConfig": "fed_dpsat.config",
    "clipped_gradient_sum": "fed_dpsat.per_example",
    "derive_generator": "fed_dpsat.noise",
    "epsilon": "fed_dpsat.privacy",
    "noise_multiplier_for": "fed_dpsat.privacy",
    "simulate": "fed_dpsat.simulation",
    "trainable": "fed_dpsat.params",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fed_dpsat' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(_EXPORTS)
