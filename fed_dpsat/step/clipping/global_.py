"""Global clipping (Bu et al. 2021, arXiv 2106.07830): examples beyond Z are dropped, the rest share one factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fed_dpsat.errors import SettingError
from fed_dpsat.step.clipping.base import check_finite_clip_norm, plain_number


@dataclass(frozen=True, kw_only=True)
class GlobalClipping:
    """g * C / Z if |g| <= Z, else 0: keeps the directions of the sum (Bu et al. 2021).

    ``global_threshold`` is Z, in gradient norms.
    """

    clip_norm: float
    global_threshold: float = 10.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_norm", check_finite_clip_norm(self.clip_norm))
        object.__setattr__(self, "global_threshold", plain_number("global_threshold", self.global_threshold))
        if not self.global_threshold > 0:
            raise SettingError("global_threshold", self.global_threshold, "above 0", "10 is a common start")

    def factors(self, squared_norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """One factor per example, the same for every parameter; 0 beyond the threshold."""
        norm = torch.stack(list(squared_norms.values())).sum(0).sqrt()
        factor = torch.full_like(norm, self.clip_norm / self.global_threshold)
        return dict.fromkeys(squared_norms, factor.where(norm <= self.global_threshold, 0))


CLIPPING = {"global": GlobalClipping}
