"""Adaptive clipping: the bound follows a private quantile of the gradient norms (Andrew et al. 2021, arXiv 1905.03871).

Each step also asks how many examples stayed below C. The indicator, moved to -1/2 or 1/2, is one more coordinate of
what an example contributes, so gradient and count are one Gaussian mechanism (Theorem 1): with noise multiplier z_count
on the count, whose sensitivity is 1/2, and z_gradient on the gradient, the step costs what noise multiplier z costs,
z^-2 = z_gradient^-2 + z_count^-2. The event stays that of ``noise_multiplier`` z; the gradient takes more noise than z.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fed_dpsat.errors import SettingError
from fed_dpsat.step.clipping.base import check_finite_clip_norm, plain_number
from fed_dpsat.step.clipping.flat import FlatClipping

COUNT_SHARE = 20
"""The standard deviation of the noise on the count is the expected batch size over this: the paper's m / 20."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveClipping:
    """Flat clipping whose C follows a private quantile of the norms, at no extra event (Andrew et al. 2021).

    ``clip_norm`` is the first C; ``clip_quantile`` the share of examples that should stay below C; each step C is
    multiplied by exp(-clip_lr * (noisy share - clip_quantile)). C stays between 1e-6 and 1e6.
    """

    clip_norm: float
    clip_quantile: float = 0.5
    clip_lr: float = 0.2

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_norm", check_finite_clip_norm(self.clip_norm))
        for name in ("clip_quantile", "clip_lr"):
            object.__setattr__(self, name, plain_number(name, getattr(self, name)))
        if not 0 < self.clip_quantile < 1:
            raise SettingError("clip_quantile", self.clip_quantile, "in (0, 1)", "0.5 is the paper's")
        if not 0 <= self.clip_lr < math.inf:
            raise SettingError("clip_lr", self.clip_lr, "in [0, inf)", "0.2 is the paper's")

    def factors(self, squared_norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """As flat clipping at the first C."""
        return FlatClipping(clip_norm=self.clip_norm).factors(squared_norms)

    def noise_multipliers(self, noise_multiplier: float, expected_batch_size: float) -> tuple[float, float]:
        """``(z_gradient, z_count)`` that together cost what ``noise_multiplier`` costs; both 0 for 0.

        ``SettingError`` where the count alone would cost more than the step.
        """
        if noise_multiplier == 0:
            return 0.0, 0.0
        count = 2 * expected_batch_size / COUNT_SHARE
        if count <= noise_multiplier:
            raise SettingError(
                "clipping",
                "adaptive",
                f"possible at noise_multiplier={noise_multiplier:g} with an expected batch of "
                f"{expected_batch_size:g}: the count would cost more than the step",
                "raise sample_rate, or use flat",
            )
        return (noise_multiplier**-2 - count**-2) ** -0.5, count

    def next_clip_norm(self, clip_norm: float, share_below: float) -> float:
        """C for the next step, from the noised share of examples that stayed below this one."""
        return min(max(clip_norm * math.exp(-self.clip_lr * (share_below - self.clip_quantile)), 1e-6), 1e6)


@dataclass(kw_only=True)
class Tally:
    """Flat clipping of one step that also counts who stayed below C; ``centred``, the count, is sensitive."""

    clip_norm: float
    centred: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        self.clip_norm = check_finite_clip_norm(self.clip_norm)

    def factors(self, squared_norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """As flat clipping; adds 1/2 per example below C and -1/2 per example above."""
        norm = torch.stack(list(squared_norms.values())).sum(0).sqrt()
        self.centred += float((norm <= self.clip_norm).sum()) - len(norm) / 2
        return FlatClipping(clip_norm=self.clip_norm).factors(squared_norms)


CLIPPING = {"adaptive": AdaptiveClipping}
