"""What a private optimizer asks of each example: a gradient at one point, or a ``Query``.

=============================== =================================================================
case                            the sum and the private gradient
=============================== =================================================================
one point of weight 1, no mask  as for plain ``Params``, to the bit
a name with a mask              a vector of its active coordinates: clipping and noise see no other
a mask that is True everywhere  no mask: the name keeps its shape
a mask that is False everywhere an empty vector; ``spread`` gives zeros
names with a ``Slope``          one number for each, of losses: no pass backward
=============================== =================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params, zeros_like
from fed_dpsat.step.clipping.base import plain_number
from fed_dpsat.step.examples import Examples
from fed_dpsat.step.unchecked import checking

PLAIN: tuple[type, ...] = (Tensor, nn.Parameter)
"""Tensors whose functions are torch's own."""


class LossFn(Protocol):
    """Losses ``[B]``, one per example, of a batch whose examples do not mix."""

    def __call__(self, params: Params, inputs: Examples, targets: Examples, /) -> Tensor:
        """``inputs[B, ...], targets[B, ...] -> losses[B]``."""


@runtime_checkable
class OfOutputs(Protocol):
    """A loss that is a criterion of a network's outputs."""

    @property
    def criterion(self) -> Callable[[Any, Any], Tensor]:
        """``outputs[B, ...], targets[B, ...] -> losses[B]``."""

    def outputs(self, params: Params, inputs: Examples, /) -> Any:
        """``inputs[B, ...] -> outputs[B, K]``."""


Wrapper: TypeAlias = Callable[[LossFn], LossFn]
"""Makes another loss of one."""


@dataclass(frozen=True, kw_only=True)
class Slope:
    """The weighted sum of an example's losses at ``points()``, over ``width``: a finite difference.

    ``points`` makes pairs of a weight and parameters, one after the other, so that one model is held at a time.
    """

    points: Callable[[], Iterable[tuple[float, Params]]]
    width: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "width", plain_number("width", self.width))


@dataclass(frozen=True, kw_only=True)
class Query:
    """The weighted sum of an example's gradients at public ``points``, on the ``active`` coordinates of its ``loss``.

    ``points`` are pairs of a weight and parameters, all with the same names and shapes; ``active`` has a bool mask for
    any of the names (without one a name is active in whole); ``loss`` wraps the loss of an example. All three are made
    of public state alone; a wrapped loss sees examples, so training takes ``KNOWN_LOSSES`` alone. Engines combine, drop
    what is inactive, and only then clip, example by example: whatever is asked, an example adds no more than
    ``clip_norm``.

    With ``slopes`` the one point holds a number for each of their names, and an example's gradient in it is the slope:
    engines take forward passes alone, and keep no graph.

    Raises ``ValueError`` for no point, for points, masks or slopes that do not fit, or a weight that is not finite.
    """

    points: tuple[tuple[float, Params], ...]
    active: Params | None = None
    loss: Wrapper | None = None
    slopes: Mapping[str, Slope] | None = None

    def __post_init__(self) -> None:
        weighted = tuple((plain_number("weight", weight), point) for weight, point in self.points)
        object.__setattr__(self, "points", weighted)
        if not self.points:
            raise ValueError("a query without a point; one point of weight 1 is the gradient there")
        shapes = _shapes(self.points[0][1])
        for weight, point in self.points:
            if not math.isfinite(weight) or _shapes(point) != shapes:
                raise ValueError(f"a query at {_shapes(point)} of weight {weight}, whose first point has {shapes}")
        for name, mask in (self.active or {}).items():
            if mask.dtype != torch.bool or shapes.get(name) != tuple(mask.shape):
                raise ValueError(
                    f"a mask {mask.dtype}{list(mask.shape)} of {name!r}; it is bool, of the shape in {shapes}"
                )
        if self.slopes and (len(self.points) > 1 or self.active or shapes != dict.fromkeys(self.slopes, ())):
            raise ValueError(f"slopes {sorted(self.slopes)} at {shapes}; they need one point, of one number for each")
        partial = {name: mask for name, mask in (self.active or {}).items() if not bool(mask.all())}
        object.__setattr__(self, "active", partial or None)

    @property
    def plain(self) -> Params | None:
        """The one point, if nothing more than its gradient is asked for."""
        (weight, point), *more = self.points
        return None if more or weight != 1 or self.active or self.loss or self.slopes else point


At: TypeAlias = Params | Query
"""What ``query_point`` answers: plain parameters are the query of one point."""


def as_query(at: At) -> Query:
    """``at`` in its general form."""
    return at if isinstance(at, Query) else Query(points=((1.0, at),))


def simplified(at: At) -> At:
    """The point of a query that is one; any other ``at`` as it is. Raises as ``plain_tensors``."""
    if type(at) is not Query:
        return plain_tensors(at)  # type: ignore[arg-type]  # also a class derived from Query is refused
    for params in (*(point for _, point in at.points), _masks(at)):
        plain_tensors(params)
    if any(type(slope) is not Slope for slope in (at.slopes or {}).values()):
        raise SettingError("optimizer", "slopes", "one that asks for slopes of the class Slope itself", "make them so")
    return at if at.plain is None else at.plain


@dataclass(frozen=True)
class Composed:
    """``outer`` around ``inner``: two wrapped losses as one."""

    outer: Wrapper
    inner: Wrapper

    def __call__(self, loss: LossFn) -> LossFn:
        """``outer(inner(loss))``."""
        return self.outer(self.inner(loss))


KNOWN_LOSSES: list[type] = []
"""Classes of wrapped losses of which is known that they keep nothing of the examples that they see."""


def check_loss(loss: Wrapper | None) -> None:
    """Raise ``SettingError`` for a wrapped loss of another class, which could keep what it sees before noise."""
    if type(loss) is Composed:
        check_loss(loss.outer)
        check_loss(loss.inner)
    elif loss is not None and type(loss) not in KNOWN_LOSSES and checking():
        raise SettingError(
            "optimizer",
            type(loss).__name__,
            "one whose wrapped loss is known to keep nothing of the examples that it sees (saf's)",
            "add the term after the noise, or vouch for yours: `with fed_dpsat.step.unchecked.unchecked():`",
        )


def plain_tensors(params: Params) -> Params:
    """``params``; raises ``SettingError`` unless it is a dict of tensors of torch's own class.

    torch calls the functions of a derived class with all arguments of an operation, so with examples and their
    gradients: an optimizer, or a client's half, would see them before noise.
    """
    strange = next((p for p in params.values() if type(p) not in PLAIN), None) if type(params) is dict else params
    if strange is not None:
        raise SettingError(
            "optimizer",
            type(strange).__name__,
            "one that asks at a dict of plain tensors: code of another class would be called with the batch",
            "return {name: t.as_subclass(torch.Tensor), ...}",
        )
    return params


def map_points(at: At, move: Callable[[Params], Params]) -> At:
    """``move`` at every point; all else stays."""
    if not isinstance(at, Query):
        return move(at)
    return replace(at, points=tuple((weight, move(point)) for weight, point in at.points))


def mixture(parts: Sequence[tuple[float, At]]) -> At:
    """Weighted queries of the same mask and loss as one; those of weight 0 are not asked."""
    first = as_query(parts[0][1])
    points = tuple((w * weight, point) for w, at in parts if w for weight, point in as_query(at).points)
    return simplified(replace(first, points=points))


def first_point(at: At) -> Params:
    """A point, for names, shapes and types: those of the gradient that ``update`` is given."""
    return at.points[0][1] if isinstance(at, Query) else at


def compacted(at: At, rows: Params) -> Params:
    """``rows[B, *shape]``, but ``[B, active]`` where ``at`` has a mask."""
    active = {name: mask.flatten().nonzero()[:, 0] for name, mask in _masks(at).items()}
    return {name: g.flatten(1).index_select(1, active[name]) if name in active else g for name, g in rows.items()}


def compact(at: At, full: Params) -> Params:
    """``full``, but a vector of its active coordinates where ``at`` has a mask."""
    masks = _masks(at)
    return {name: g[masks[name]] if name in masks else g for name, g in full.items()}


def spread(at: At, compact: Params) -> Params:
    """The inverse of ``compact``: full shapes, zeros in what is not active."""
    masks = _masks(at)
    return {
        name: g.new_zeros(masks[name].shape).masked_scatter(masks[name], g) if name in masks else g
        for name, g in compact.items()
    }


def zero_sum(at: At) -> Params:
    """The sum over no example."""
    return compact(at, zeros_like(first_point(at)))


def _masks(at: At) -> Params:
    return (at.active or {}) if isinstance(at, Query) else {}


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in params.items()}
