"""Conformance of clipping rules: in any batch, no example adds more than ``clip_norm`` to the sum."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fed_dpsat.params import Params, global_norm, subtract
from fed_dpsat.step.clipping import ClippingRule
from fed_dpsat.step.gradients.per_example import clipped_gradient_sum
from fed_dpsat.testing.conformance import require, run_checks
from fed_dpsat.testing.problems import Shapes, filled, prescribed, size

MakeRule = Callable[[float], ClippingRule]

CLIP_NORMS = (0.1, 1.0, 10.0)
TOLERANCE = 1e-6
RATIOS = (0.0, 1e-30, 1e-3, 1 - 1e-7, 1.0, 1 + 1e-7, 2.0, 1e4, 1e30)
"""Norms of adversarial gradients, in units of ``clip_norm``."""

LAYOUTS: dict[str, Shapes] = {
    "one tensor": {"w": (5,)},
    "62 tensors": {f"layer{i}": ((), (1,), (3,), (2, 2))[i % 4] for i in range(62)},
    "a large and a scalar tensor": {"w": (40, 25), "scale": ()},
}


def check_clipping(factory: Callable[..., Any]) -> list[str]:
    """Run the suite on ``clip_norm -> rule``, a class or a function; returns the names of the checks.

    The gradients have norms from 0 to 1e30 clip_norm, in one tensor, in one coordinate, or spread over 62 tensors.
    Raises ``ConformanceError``.
    """
    by_name = "clip_norm" in inspect.signature(factory).parameters
    return run_checks("clipping", CHECKS, lambda clip_norm: _made(factory, clip_norm, by_name))


def declares_its_clip_norm(make: MakeRule) -> None:
    """``rule.clip_norm`` is the given ``clip_norm``, because the noise is scaled to it."""
    for clip_norm in CLIP_NORMS:
        declared = make(clip_norm).clip_norm
        require(
            declared == clip_norm,
            expected=f"clip_norm={clip_norm}",
            seen=f"rule.clip_norm={declared!r}",
            remedy="the mechanism scales its noise to rule.clip_norm: store the given value",
        )


def gives_one_factor_per_example_and_parameter(make: MakeRule) -> None:
    """``factors`` maps squared norms ``[B]`` to finite factors ``[B]`` >= 0 of the same names, for B = 0 too."""
    for batch in (0, 1, 4):
        norms = {"a": torch.tensor([4.0, 0.25, 1e-3, 1e8])[:batch], "b": torch.zeros(batch)}
        factors = make(1.0).factors(norms)
        seen = {name: (tuple(f.shape), bool(f.isfinite().all())) for name, f in factors.items()}
        require(
            seen == dict.fromkeys(norms, ((batch,), True)),
            expected=f"finite factors of shape ({batch},) for {sorted(norms)}",
            seen=str(seen),
            remedy="return one factor per example under every name of squared_norms",
        )
        lowest = min((float(f.min()) for f in factors.values() if batch), default=0.0)
        require(
            lowest >= 0,
            expected="no negative factor",
            seen=f"{lowest:.6g}",
            remedy="make each factor at least 0: a run refuses others",
        )


def sensitivity_is_at_most_clip_norm(make: MakeRule) -> None:
    """The contribution of one example has a norm of at most clip_norm (1 + 1e-6), over all tensors together."""
    for clip_norm, name, shapes in _settings():
        rule, norms = make(clip_norm), {}
        for what, row in _adversarial(shapes, clip_norm):
            for dtype in (torch.float64, torch.float32):
                alone = _sum(rule, shapes, row[None].to(dtype))
                norm = float(global_norm({n: g.double() for n, g in alone.items()}))
                norms[f"{what} ({str(dtype).removeprefix('torch.')})"] = math.inf if math.isnan(norm) else norm
        worst = max(norms, key=norms.__getitem__)
        require(
            norms[worst] <= clip_norm * (1 + TOLERANCE),
            expected=f"a norm of at most clip_norm={clip_norm} over {name}",
            seen=f"{norms[worst]:.6g} from {worst}",
            remedy="bound the norm over all parameters together: clipping k tensors to clip_norm each leaves "
            "clip_norm * sqrt(k)",
        )


def zero_gradient_adds_zero(make: MakeRule) -> None:
    """An example with a zero gradient adds zero: clip_norm / 0 is not a factor."""
    shapes = LAYOUTS["62 tensors"]
    total = _sum(make(1.0), shapes, torch.zeros(2, size(shapes)))
    require(
        all(bool((t == 0).all()) for t in total.values()),
        expected="a zero sum from zero gradients",
        seen=f"norm {float(global_norm(total))}",
        remedy="return a finite factor for a squared norm of 0, for example 1",
    )


def nonfinite_examples_add_zero(make: MakeRule) -> None:
    """Examples with NaN or inf do not change the sum of the others, and are counted."""
    shapes, rule = LAYOUTS["one tensor"], make(1.0)
    rows = torch.randn(5, size(shapes), generator=torch.Generator().manual_seed(0))
    bad = rows.clone()
    bad[1, 0], bad[3, 2] = math.nan, math.inf
    total, dropped = clipped_gradient_sum(prescribed, filled(shapes), (bad, torch.zeros(5)), rule)
    away = float(global_norm(subtract(total, _sum(rule, shapes, rows[[0, 2, 4]]))))
    require(
        dropped == 2 and away <= TOLERANCE,
        expected="the sum over the 3 finite examples, 2 dropped",
        seen=f"{dropped} dropped, the sum {away:.3g} away",
        remedy="compute a factor only from the norms of its own example",
    )


def factors_ignore_the_other_examples(make: MakeRule) -> None:
    """The factors of an example are equal alone, in a batch, in another order and beside huge neighbours."""
    rule, generator = make(1.0), torch.Generator().manual_seed(0)
    norms = {n: torch.rand(6, generator=generator, dtype=torch.float64) * 4 for n in ("a", "b")}
    alone = [rule.factors({n: v[i : i + 1] for n, v in norms.items()}) for i in range(6)]
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    huge = {n: torch.cat([v, torch.full((2,), 1e60, dtype=torch.float64)]) for n, v in norms.items()}
    reordered = rule.factors({n: v[order] for n, v in norms.items()})
    for where, factors in (
        ("in a batch of 6", rule.factors(norms)),
        ("beside two norms of 1e30", {n: f[:6] for n, f in rule.factors(huge).items()}),
        ("in another order", {n: torch.empty_like(f).index_copy(0, order, f) for n, f in reordered.items()}),
    ):
        for i, own in enumerate(alone):
            away = max(abs(float(factors[n][i]) - float(own[n][0])) for n in norms)
            require(
                away <= 1e-5,
                expected="the factors of an example alone",
                seen=f"{away:.3g} away {where}",
                remedy="use no mean, maximum or sum over the batch: an example must not change the others",
            )


def a_neighbouring_batch_is_clip_norm_away(make: MakeRule) -> None:
    """Adding one example to a batch moves the clipped sum by at most clip_norm (1 + 1e-6)."""
    shapes, clip_norm = LAYOUTS["one tensor"], 1.0
    rule = make(clip_norm)
    batch = torch.randn(20, size(shapes), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = _sum(rule, shapes, batch)
    for what, row in _adversarial(shapes, clip_norm):
        moved = float(global_norm(subtract(_sum(rule, shapes, torch.cat([batch, row[None]])), before)))
        require(
            moved <= clip_norm * (1 + TOLERANCE),
            expected=f"the sum to move by at most clip_norm={clip_norm}",
            seen=f"{moved:.6g} for {what}",
            remedy="an example may change only its own contribution",
        )


def same_norms_give_same_factors(make: MakeRule) -> None:
    """``factors`` changes neither its argument nor the rule."""
    rule, norms = make(1.0), {"a": torch.tensor([4.0, 0.0, 9.0]), "b": torch.tensor([0.5, 0.0, 1.0])}
    given = {n: v.clone() for n, v in norms.items()}
    first = {n: f.clone() for n, f in rule.factors(norms).items()}
    rule.factors({n: 100 * v + 1 for n, v in norms.items()})
    again = rule.factors(norms)
    require(
        all(torch.equal(norms[n], given[n]) and torch.equal(first[n], again[n]) for n in norms),
        expected="equal factors for equal norms, and unchanged norms",
        seen=f"factors {_values(first)}, later {_values(again)}, norms {_values(norms)} of {_values(given)}",
        remedy="compute new tensors; store no state of a batch in the rule",
    )


CHECKS = (
    declares_its_clip_norm,
    gives_one_factor_per_example_and_parameter,
    same_norms_give_same_factors,
    zero_gradient_adds_zero,
    sensitivity_is_at_most_clip_norm,
    nonfinite_examples_add_zero,
    factors_ignore_the_other_examples,
    a_neighbouring_batch_is_clip_norm_away,
)


def _made(factory: Callable[..., Any], clip_norm: float, by_name: bool) -> ClippingRule:
    rule: ClippingRule = factory(clip_norm=clip_norm) if by_name else factory(clip_norm)
    return rule


def _settings() -> Iterator[tuple[float, str, Shapes]]:
    for name, shapes in LAYOUTS.items():
        for clip_norm in CLIP_NORMS if name == "one tensor" else (1.0,):
            yield clip_norm, name, shapes


def _adversarial(shapes: Shapes, clip_norm: float) -> Iterator[tuple[str, Tensor]]:
    """Gradients ``[D]`` in float64, each with a description."""
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(sum(sizes), generator=generator, dtype=torch.float64)
    parts = torch.split(spread, sizes)
    last = torch.cat([torch.zeros(sum(sizes) - sizes[-1], dtype=torch.float64), parts[-1]])
    directions = {
        "in random directions": spread,
        "all in one coordinate": torch.nn.functional.one_hot(torch.tensor(0), sum(sizes)).double(),
    }
    if len(parts) > 1:  # of one tensor, these are the random direction
        directions |= {
            "the same in every tensor": torch.cat([p / p.norm() for p in parts]),
            "all in one tensor": last,
            "ever smaller by tensor": torch.cat([p / p.norm() * 10.0**-i for i, p in enumerate(parts)]),
        }
    for how, direction in directions.items():
        for ratio in RATIOS:
            yield f"a gradient of norm {ratio:.8g} clip_norm, {how}", direction / direction.norm() * ratio * clip_norm


def _sum(rule: ClippingRule, shapes: Shapes, rows: Tensor) -> Params:
    params = filled(shapes, dtype=rows.dtype)
    return clipped_gradient_sum(prescribed, params, (rows, torch.zeros(len(rows))), rule)[0]


def _values(tensors: Params) -> dict[str, list[float]]:
    return {name: t.tolist() for name, t in tensors.items()}
