"""Per-sample adaptive clipping: DP-PSAC (Xia et al., AAAI 2023, arXiv 2212.00328) and DP-PSASC (arXiv 2411.03059)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fed_dpsat.errors import SettingError
from fed_dpsat.step.clipping.base import check_finite_clip_norm, plain_number


@dataclass(frozen=True, kw_only=True)
class PSACClipping:
    """g * s C / (s|g| + r / (|g| + r)): below C for each g, and a small gradient gets a small weight.

    With ``s = 1`` it is DP-PSAC: the weight is C at |g| = 0, where ``automatic`` has 100 C, and at most
    C / (2 sqrt(r) - r). Another ``s`` makes it DP-PSASC, whose g * C' / (s|g| + r / (|g| + r)) has the bound C' / s:
    C is that bound here, so noise follows it. ``r``, in gradient norms, is in (0, 1]: 0.01 and 0.1 are the papers';
    ``s`` is in (0, 100].
    """

    clip_norm: float
    r: float = 0.1
    s: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_norm", check_finite_clip_norm(self.clip_norm))
        for name in ("r", "s"):
            object.__setattr__(self, name, plain_number(name, getattr(self, name)))
        if not 0 < self.r <= 1:
            raise SettingError("r", self.r, "in (0, 1]", "0.1 is a common start")
        if not 0 < self.s <= 100:
            raise SettingError("s", self.s, "in (0, 100]", "1 is DP-PSAC")

    def factors(self, squared_norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """One factor per example, the same for every parameter."""
        norm = torch.stack(list(squared_norms.values())).sum(0).sqrt()
        return dict.fromkeys(squared_norms, self.s * self.clip_norm / (self.s * norm + self.r / (norm + self.r)))


CLIPPING = {"psac": PSACClipping}
