"""Whether factors keep the bound that noise is scaled to: looked at where they are used, whatever the rule.

============================================ =====================================================
an example's factors                         what happens
============================================ =====================================================
factor^2 * squared norm, summed, <= C^2      used; 1e-6 of C is left to the rounding of a float32
factor * norm, summed, > C, if C is of L1    ``SettingError``, before anything is added up
more; negative; NaN; C inf and a factor inf  ``SettingError``, before anything is added up
a norm of 0 and a factor of 1e12 C or more   the same: a norm that small may be one that vanished
a name or an example too many or too few     the same
a rule that is not this library's own        asked for each example alone, in a fresh copy of the rule
one without a copy                           ``SettingError``
other factors when it is asked again         ``SettingError``
============================================ =====================================================

A copy is a deep copy. What a rule keeps outside of itself, in a global or a closure, is found where it changes a factor
at once: each is asked for again in the opposite order, also those of three public examples before and after all others.

No error says a norm, a factor or a batch size: those are sensitive.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from fed_dpsat.errors import SettingError
from fed_dpsat.step.clipping.adaptive import AdaptiveClipping, Tally
from fed_dpsat.step.clipping.automatic import AutomaticClipping
from fed_dpsat.step.clipping.base import ClippingRule, check_clip_norm
from fed_dpsat.step.clipping.flat import FlatClipping
from fed_dpsat.step.clipping.global_ import GlobalClipping
from fed_dpsat.step.clipping.l1 import L1Clipping
from fed_dpsat.step.clipping.per_layer import PerLayerClipping
from fed_dpsat.step.clipping.psac import PSACClipping
from fed_dpsat.step.unchecked import checking

SLACK = 2e-6
"""Of C^2: factors, and sums of squares, are as good as float32."""

LEAST = 1e-24
"""The least squared norm that counts: squares of float32 vanish below 1e-45, also beside factors of 1e16."""


OWN = (
    AdaptiveClipping,
    AutomaticClipping,
    FlatClipping,
    GlobalClipping,
    L1Clipping,
    PerLayerClipping,
    PSACClipping,
    Tally,
)
"""Of these, and of no class derived from them, it is known that no example has a part in the factors of another."""

PUBLIC = (1e-4, 1.0, 1e4)
"""Squared norms of nobody, which tell whether a rule answers otherwise once it has seen the examples."""

Squares = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Held:
    """``rule`` held to ``clip_norm``, the bound of the mechanism, whatever the rule says of its own later.

    ``norm`` is "L2", or "L1" for a mechanism whose noise is scaled to that of an example's numbers, one for each name.
    Raises ``SettingError`` for a ``clip_norm`` that is not a real number above 0.
    """

    rule: ClippingRule
    clip_norm: float
    norm: str = "L2"

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_norm", check_clip_norm(self.clip_norm))

    def factors(self, squared_norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of the rule."""
        return self.rule.factors(squared_norms)


def held(rule: ClippingRule) -> ClippingRule:
    """``rule`` with a bound that stays: as it is for one of this library's own, and for one that is held."""
    return rule if type(rule) is Held or is_own(rule) else Held(rule=rule, clip_norm=rule.clip_norm)


def bounds_l1(rule: ClippingRule) -> bool:
    """Whether ``rule`` is one whose factors may bound the L1 norm of numbers: ``l1``, or a rule of somebody else."""
    inner = rule.rule if type(rule) is Held else rule
    return not isinstance(inner, AdaptiveClipping) and (type(inner) is L1Clipping or not is_own(inner))


def is_own(rule: ClippingRule) -> bool:
    """Whether all that ``rule`` does is this library's: its very class, with numbers in it that are plain."""
    if type(rule) is Held:
        return is_own(rule.rule)
    return type(rule) in OWN and all(type(value) in (int, float) for value in vars(rule).values())


def bounded_factors(
    rule: ClippingRule, squared_norms: Squares, rows: Tensor, asked: Callable[[Squares], Squares] | None = None
) -> Squares:
    """Factors ``[*]`` by name for ``squared_norms[*]``; ``rows[P, *]`` are the same, which the rule has no hold of.

    ``asked`` stands in for ``rule.factors``, where all examples are asked for at once. Raises ``SettingError``, as
    ``check_factors`` does, and for a rule that cannot be copied or whose factors are other ones when it is asked again.
    """
    if not checking() or is_own(rule):
        factors = (asked or rule.factors)(dict(squared_norms))
    else:
        factors = _example_by_example(rule, list(squared_norms), rows)
    check_factors(rule, factors, list(squared_norms), rows)
    return factors


def _example_by_example(rule: ClippingRule, names: list[str], rows: Tensor) -> Squares:
    flat = torch.cat([rows.new_tensor(PUBLIC).expand(len(names), -1), rows.flatten(1)], 1)
    found, again = (torch.empty_like(flat, dtype=torch.float64) for _ in range(2))
    for into, order in ((found, range(flat.shape[1])), (again, reversed(range(flat.shape[1])))):
        for i in order:
            into[:, i] = _alone(rule, names, flat[:, i])
    if not torch.equal(found.nan_to_num(-1), again.nan_to_num(-1)):
        _refuse(rule, "one whose factors follow from the norms of an example alone", "keep nothing, and draw nothing")
    return dict(zip(names, found[:, len(PUBLIC) :].view(rows.shape), strict=True))


def _alone(rule: ClippingRule, names: list[str], squares: Tensor) -> Tensor:
    """Factors ``[P]`` for one example's ``squares[P]``, from a copy of the rule that has seen nothing of the batch."""
    inner = rule.rule if type(rule) is Held else rule
    try:
        own = copy.deepcopy(inner)
    except Exception:  # whatever a class does there
        own = inner
    if own is inner:
        _refuse(rule, "one that copy.deepcopy copies", "keep in it only what can be copied")
    factors = _plain(own.factors({name: square.clone()[None] for name, square in zip(names, squares, strict=True)}))
    _check_form(rule, factors, names, squares[:, None])
    return torch.cat([factors[name].double() for name in names])


def _plain(factors: Any) -> Any:
    """Each read once, into a tensor that nobody else has; what cannot be read so stays, and is refused."""
    if not isinstance(factors, Mapping):
        return factors
    return {name: _own_tensor(factor) for name, factor in dict(factors).items()}


def _own_tensor(factor: Any) -> Any:
    """A class derived from ``Tensor`` may answer each function as it likes."""
    return Tensor.detach(factor).clone() if type(factor) in (Tensor, torch.nn.Parameter) else None


def check_factors(rule: ClippingRule, factors: Mapping[str, Tensor], names: list[str], rows: Tensor) -> None:
    """Raise ``SettingError`` unless each of the examples ``rows[P, *]`` keeps at most ``rule.clip_norm``.

    ``rows`` are finite squared norms, in the order of ``names``; ``factors`` are ``[*]`` by name.
    """
    if not checking():
        return
    distinct = _check_form(rule, factors, names, rows)
    least = min(LEAST, 1e-7 * rule.clip_norm**2 / len(names))
    bound = min(rule.clip_norm**2 * (1 + SLACK), sys.float_info.max)
    if type(rule) is Held and rule.norm == "L1":
        lowest = torch.stack([factors[name].double() for name in names])
        kept = (lowest * rows.clamp(min=least).sqrt()).sum(0).square()
    elif len(distinct) == 1:
        (one,) = distinct
        kept, lowest = one.double().square() * rows.sum(0).clamp(min=least), one
    else:
        each = torch.stack([factors[name].double() for name in names])
        kept, lowest = (each.square() * rows.clamp(min=least)).sum(0), each
    if bool((lowest < 0).any()):
        _refuse(rule, "one without a negative factor", "make each factor at least 0")
    if not bool((kept <= bound).all() & (lowest >= 0).all()):
        _refuse(rule, f"one that keeps the bound: it leaves an example more than clip_norm={rule.clip_norm:g}, or NaN")


def _check_form(rule: ClippingRule, factors: Any, names: list[str], rows: Tensor) -> list[Tensor]:
    """The different ones among ``factors``; ``SettingError`` unless each name has one, a real number per example."""
    if not isinstance(factors, Mapping) or factors.keys() != set(names):
        _refuse(rule, "with a factor for each name of squared_norms, and for no other")
    distinct = list({id(factor): factor for factor in factors.values()}.values())
    if not all(isinstance(f, Tensor) and f.shape == rows.shape[1:] and not f.is_complex() for f in distinct):
        _refuse(rule, "with one real factor per example, a tensor of the shape of the squared norms")
    return distinct


def _refuse(
    rule: ClippingRule, bound: str, remedy: str = "make sum(factor^2 * squared_norm) <= clip_norm^2"
) -> NoReturn:
    name = type(rule.rule if isinstance(rule, Held) else rule).__name__
    raise SettingError("clipping", name, bound, f"{remedy}, and run fed_dpsat.testing.check_clipping on the rule")
