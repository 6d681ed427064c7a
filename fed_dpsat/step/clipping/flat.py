"""Flat clipping: one bound on the whole gradient of an example.

============== =======================
squared norm   factor under ``flat``
============== =======================
0              1
below C^2      1
above C^2      C / norm
inf, NaN       the engine drops the example before it asks
============== =======================
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fed_dpsat.step.clipping.base import check_clip_norm


@dataclass(frozen=True, kw_only=True)
class FlatClipping:
    """g * min(1, C / |g|), norm over all parameters (Abadi et al. 2016)."""

    clip_norm: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_norm", check_clip_norm(self.clip_norm))

    def factors(self, squared_norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """One factor per example, the same for every parameter."""
        norm = torch.stack(list(squared_norms.values())).sum(0).sqrt()
        factor = torch.ones_like(norm) if math.isinf(self.clip_norm) else (self.clip_norm / norm).clamp(max=1)
        return dict.fromkeys(squared_norms, factor)


CLIPPING = {"flat": FlatClipping}
