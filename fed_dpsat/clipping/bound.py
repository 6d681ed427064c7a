"""Whether factors keep the bound that noise is scaled to: looked at where they are used, whatever the rule.

============================================ =====================================================
an example's factors                         what happens
============================================ =====================================================
factor^2 * squared norm, summed, <= C^2      used; 1e-6 of C is left to the rounding of a float32
more; negative; NaN; C inf and a factor inf  ``SettingError``, before anything is added up
a norm of 0 and a factor of 1e12 C or more   the same: a norm that small may be one that vanished
a name or an example too many or too few     the same
============================================ =====================================================

No error says a norm, a factor or a batch size: those are sensitive.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from fed_dpsat.clipping.base import ClippingRule
from fed_dpsat.errors import SettingError
from fed_dpsat.unchecked import checking

SLACK = 2e-6
"""Of C^2: factors, and sums of squares, are as good as float32."""

LEAST = 1e-24
"""The least squared norm that counts: squares of float32 vanish below 1e-45, also beside factors of 1e16."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """``rule`` held to ``clip_norm``, the bound of the mechanism, whatever the rule says of its own later."""

    rule: ClippingRule
    clip_norm: float

    def factors(self, squared_norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of the rule."""
        return self.rule.factors(squared_norms)


def bounded_factors(rule: ClippingRule, squared_norms: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """``rule.factors(squared_norms)``, checked; ``rows[P, B]`` are the same norms, which the rule has no hold of.

    Raises ``SettingError``, as ``check_factors`` does.
    """
    factors = rule.factors(dict(squared_norms))
    check_factors(rule, factors, list(squared_norms), rows)
    return factors


def check_factors(rule: ClippingRule, factors: Mapping[str, Tensor], names: list[str], rows: Tensor) -> None:
    """Raise ``SettingError`` unless each of the examples ``rows[P, *]`` keeps at most ``rule.clip_norm``.

    ``rows`` are finite squared norms, in the order of ``names``; ``factors`` are ``[*]`` by name.
    """
    if not checking():
        return
    if not isinstance(factors, Mapping) or factors.keys() != set(names):
        _refuse(rule, "with a factor for each name of squared_norms, and for no other")
    distinct = {id(factor): factor for factor in factors.values()}
    if not all(_fits(factor, rows) for factor in distinct.values()):
        _refuse(rule, "with one real factor per example, a tensor of the shape of the squared norms")
    least = min(LEAST, 1e-7 * rule.clip_norm**2 / len(names))
    bound = min(rule.clip_norm**2 * (1 + SLACK), sys.float_info.max)
    if len(distinct) == 1:
        (one,) = distinct.values()
        kept, lowest = one.double().square() * rows.sum(0).clamp(min=least), one
    else:
        each = torch.stack([factors[name].double() for name in names])
        kept, lowest = (each.square() * rows.clamp(min=least)).sum(0), each
    if not bool((kept <= bound).all() & (lowest >= 0).all()):
        _refuse(rule, f"one that keeps the bound: it leaves an example more than clip_norm={rule.clip_norm:g}, or NaN")


def _fits(factor: Any, rows: Tensor) -> bool:
    return isinstance(factor, Tensor) and factor.shape == rows.shape[1:] and not factor.is_complex()


def _refuse(rule: ClippingRule, bound: str) -> NoReturn:
    name = type(rule.rule if isinstance(rule, Held) else rule).__name__
    remedy = "make sum(factor^2 * squared_norm) <= clip_norm^2, and run fed_dpsat.testing.check_clipping on the rule"
    raise SettingError("clipping", name, bound, remedy)
