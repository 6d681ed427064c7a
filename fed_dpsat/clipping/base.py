"""Clipping rules: what bounds one example's contribution to the sum.

A rule turns the squared norms of one example's gradient, parameter by parameter, into factors. The engine
multiplies; the rule never sees a gradient. Whatever the rule, the scaled gradient of any example has a norm
of at most ``clip_norm`` over all parameters together: that is the sensitivity the noise is scaled to.

"""

from __future__ import annotations

from typing import Protocol

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


def check_finite_clip_norm(clip_norm: float) -> None:
    """Raise ``SettingError`` unless 0 < clip_norm < inf, for rules that scale to it."""
    check_clip_norm(clip_norm)
    if clip_norm == float("inf"):
        raise SettingError("clip_norm", clip_norm, "finite", "this rule scales gradients to it; flat takes inf")
