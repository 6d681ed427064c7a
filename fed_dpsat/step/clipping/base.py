"""Clipping rules: what bounds one example's contribution to the sum.

A rule turns the squared norms of one example's gradient, parameter by parameter, into factors. The engine
multiplies; the rule never sees a gradient. Whatever the rule, the scaled gradient of any example has a norm
of at most ``clip_norm`` over all parameters together: that is the sensitivity the noise is scaled to.

A rule that is not of this library is asked example by example, each time in a copy of its own: what it keeps of one
example reaches no other (``fed_dpsat.step.clipping.bound``).
"""

from __future__ import annotations

import numbers
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


def check_clip_norm(clip_norm: float) -> float:
    """``clip_norm`` as a plain float; ``SettingError`` unless it is a real number above 0 (inf means no clipping)."""
    value = plain_number("clip_norm", clip_norm)
    if not value > 0:
        raise SettingError("clip_norm", value, "above 0", "a common start is 0.1 to 1")
    return value


def check_finite_clip_norm(clip_norm: float) -> float:
    """As ``check_clip_norm``, for rules that scale to it: ``SettingError`` also for inf."""
    value = check_clip_norm(clip_norm)
    if value == float("inf"):
        raise SettingError("clip_norm", value, "finite", "this rule scales gradients to it; flat takes inf")
    return value


def plain_number(name: str, value: object) -> float:
    """``float(value)``, read once; ``SettingError`` for a bool, or what is no number: a tensor can change later."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise SettingError(name, value, "a real number", "give a float")
    try:
        return float(value)
    except OverflowError:
        raise SettingError(name, value, "a real number that a float holds", "give a smaller one") from None
