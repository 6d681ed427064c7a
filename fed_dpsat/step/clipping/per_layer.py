"""Per-layer clipping: each layer has its share of the bound (McMahan et al. 2018, arXiv 1710.06963)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fed_dpsat.step.clipping.base import check_finite_clip_norm


@dataclass(frozen=True, kw_only=True)
class PerLayerClipping:
    """Each of L layers to C / sqrt(L), so that all together stay below C (McMahan et al. 2018).

    A layer is what shares the name before the last dot: the weight and the bias of one module. Clipping every layer
    to C itself would let an example add C * sqrt(L), which is a mistake found in public code.
    """

    clip_norm: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_norm", check_finite_clip_norm(self.clip_norm))

    def factors(self, squared_norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """One factor per example and layer."""
        layers: dict[str, list[Tensor]] = {}
        for name, squared in squared_norms.items():
            layers.setdefault(name.rpartition(".")[0], []).append(squared)
        bound = self.clip_norm / math.sqrt(len(layers))
        factor = {layer: (bound / torch.stack(squared).sum(0).sqrt()).clamp(max=1) for layer, squared in layers.items()}
        return {name: factor[name.rpartition(".")[0]] for name in squared_norms}


CLIPPING = {"per-layer": PerLayerClipping}
