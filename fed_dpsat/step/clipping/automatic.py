"""Automatic clipping (Bu et al. 2022, arXiv 2206.07136, AUTO-S): every example is scaled to nearly C."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fed_dpsat.step.clipping.base import check_finite_clip_norm

STABILITY = 0.01
"""Keeps small gradients small; the paper's gamma."""


@dataclass(frozen=True, kw_only=True)
class AutomaticClipping:
    """g * C / (|g| + 0.01): no threshold to tune, C only scales the learning rate (Bu et al. 2022)."""

    clip_norm: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_norm", check_finite_clip_norm(self.clip_norm))

    def factors(self, squared_norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """One factor per example, the same for every parameter."""
        norm = torch.stack(list(squared_norms.values())).sum(0).sqrt()
        return dict.fromkeys(squared_norms, self.clip_norm / (norm + STABILITY))


CLIPPING = {"automatic": AutomaticClipping}
