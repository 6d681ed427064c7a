"""L1 clipping: one bound on the sum of the norms of an example's tensors. Of numbers, that is their L1 norm.

=========================== =====================
sum of norms                factor under ``l1``
=========================== =====================
0, below C                  1
above C                     C / sum of norms
=========================== =====================
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fed_dpsat.step.clipping.base import check_clip_norm


@dataclass(frozen=True, kw_only=True)
class L1Clipping:
    """g * min(1, C / sum of the norms of its tensors), for Laplace noise on the numbers of zeroth-order steps.

    The norm over all parameters together is at most that sum, so C bounds it too.
    """

    clip_norm: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_norm", check_clip_norm(self.clip_norm))

    def factors(self, squared_norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """One factor per example, the same for every parameter."""
        norm = torch.stack(list(squared_norms.values())).sqrt().sum(0)
        factor = torch.ones_like(norm) if math.isinf(self.clip_norm) else (self.clip_norm / norm).clamp(max=1)
        return dict.fromkeys(squared_norms, factor)


CLIPPING = {"l1": L1Clipping}
