"""Private federated learning with client-side DP-SAT.

What is exported here is what README.md and docs/ explain; everything else may change without notice. Names are
resolved when they are used, so that ``import fed_dpsat.step.mechanism`` loads neither Flower nor Ray.
"""

from __future__ import annotations

import importlib
from typing import Any

from fed_dpsat.imports import repair_torchvision

_EXPORTS = {
    "DPSAT": "fed_dpsat.step.optimizers",
    "DPSGD": "fed_dpsat.step.optimizers",
    "DPSATMomentum": "fed_dpsat.step.optimizers",
    "FlatClipping": "fed_dpsat.step.clipping",
    "GaussianMechanism": "fed_dpsat.step.mechanism",
    "ModelLoss": "fed_dpsat.step.gradients.per_example",
    "PoissonSampler": "fed_dpsat.step.sampling",
    "PrivacyEvent": "fed_dpsat.accounting",
    "PrivacyLedger": "fed_dpsat.accounting",
    "Run": "fed_dpsat.run.result",
    "RunConfig": "fed_dpsat.settings.config",
    "clipped_gradient_sum": "fed_dpsat.step.gradients.per_example",
    "derive_generator": "fed_dpsat.step.noise",
    "epsilon": "fed_dpsat.accounting",
    "load_run": "fed_dpsat.run.reading",
    "noise_multiplier_for": "fed_dpsat.accounting",
    "resume": "fed_dpsat.simulation",
    "simulate": "fed_dpsat.simulation",
    "trainable": "fed_dpsat.params",
}

__all__ = sorted(_EXPORTS)

repair_torchvision()  # in each process, workers too, before a plug-in or a pickled model imports torchvision or timm


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fed_dpsat' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(_EXPORTS)
