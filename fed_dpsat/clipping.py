"""Clipping rules: what bounds one example's contribution to the sum.

A rule turns the squared norms of one example's gradient, parameter by parameter, into factors. The engine
multiplies; the rule never sees a gradient. Whatever the rule, the scaled gradient of any example has a norm
of at most ``clip_norm`` over all parameters together: that is the sensitivity the noise is scaled to.

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
from typing import Protocol

import torch
from torch import Tensor

from fed_dpsat.errors import SettingError


class ClippingRule(Protocol):
    """``clip_norm`` bounds what one example adds; ``factors`` says how it is reached."""

    @property
    def clip_norm(self) -> float:
        """The largest norm of one example's clipped gradient, over all parameters together."""

    def factors(self, squared_norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Factors ``[B]`` per parameter from finite squared norms ``[B]`` per parameter."""


def check_clip_norm(clip_norm: float) -> None:
    """Raise ``SettingError`` unless 0 < clip_norm (inf means no clipping)."""
    if not clip_norm > 0:
        raise SettingError("clip_norm", clip_norm, "above 0", "a common start is 0.1 to 1")


@dataclass(frozen=True, kw_only=True)
class FlatClipping:
    """g * min(1, C / |g|), norm over all parameters (Abadi et al. 2016)."""

    clip_norm: float

    def __post_init__(self) -> None:
        check_clip_norm(self.clip_norm)

    def factors(self, squared_norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """One factor per example, the same for every parameter."""
        norm = torch.stack(list(squared_norms.values())).sum(0).sqrt()
        factor = torch.ones_like(norm) if math.isinf(self.clip_norm) else (self.clip_norm / norm).clamp(max=1)
        return dict.fromkeys(squared_norms, factor)


CLIPPING = {"flat": FlatClipping}
