"""The planned engine: one backward pass, and per layer the cheapest exact way to norms and weighted sums.

================================================== ==================================================
case                                               what happens
================================================== ==================================================
a parameter that no planned layer uses             zeros
a parameter that several layers use                the norm is that of the sum of their rows
a weight that is a function of parameters          rows through its Jacobian
a layer it does not know, or that mixes examples   ``vmap`` for the whole module, named once in the log
a norm that cancels, or values above 1e8            rows of that example
a rule that bounds nothing                         an ordinary pass (``plain``)
weighted points, a name with a mask                rows of those parameters, combined, without what is masked
a loss that the optimizer wraps                    ``vmap``, named once in the log
================================================== ==================================================
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params
from fed_dpsat.step.clipping import ClippingRule
from fed_dpsat.step.generators import Mark
from fed_dpsat.step.gradients import derived
from fed_dpsat.step.gradients.capture import Capture, Tape, check_routed
from fed_dpsat.step.gradients.contribution import MAY_MIX, Contribution, Rows, Unplanned
from fed_dpsat.step.gradients.course import Expected
from fed_dpsat.step.gradients.drawing import check_drawn
from fed_dpsat.step.gradients.finite import clipped_names, finite_factors
from fed_dpsat.step.gradients.formats import laid_out, turn_gradients
from fed_dpsat.step.gradients.loss import ModelLoss
from fed_dpsat.step.gradients.plain import plain_query_sum, plain_sum, unbounded
from fed_dpsat.step.gradients.probe import ask
from fed_dpsat.step.gradients.routes import routes
from fed_dpsat.step.gradients.vmap import combined, vmap_sum
from fed_dpsat.step.query import At, LossFn, Query, compacted, first_point, simplified, zero_sum

log = logging.getLogger("fed_dpsat")


def planned_sum(loss_fn: LossFn, at: At, inputs: Tensor, targets: Tensor, clipping: ClippingRule) -> tuple[Params, int]:
    """Clipped sum over ``inputs[B, ...]``, ``B`` at least 1, and how many examples were not finite.

    Raises ``SettingError`` for a loss that is not a ``ModelLoss``: there are no layers to plan for.
    """
    if not isinstance(loss_fn, ModelLoss):
        raise SettingError("engine", "planned", "for a loss other than ModelLoss", "use 'auto' or 'vmap'")
    at = simplified(at)
    if isinstance(at, Query) and at.loss:
        return _fall_back("the optimizer asks for a loss of its own", loss_fn, at, inputs, targets, clipping)
    answer = ask(loss_fn, first_point(at), inputs, targets)
    if answer.refusal:
        return _fall_back(answer.refusal, loss_fn, at, inputs, targets, clipping)
    inputs = laid_out(inputs, answer.channels_last)
    if unbounded(clipping) and (total := _plain(loss_fn, at, inputs, targets)) is not None:
        return total, 0
    try:
        held = _held(loss_fn, at, inputs, targets, answer.expected)
    except Unplanned as unplanned:
        return _fall_back(str(unplanned), loss_fn, at, inputs, targets, clipping)
    return _clipped_sum(held, zero_sum(at), len(inputs), clipping)  # which asks the rule: no way back from here


def _plain(loss_fn: ModelLoss, at: At, inputs: Tensor, targets: Tensor) -> Params | None:
    ordinary = plain_query_sum if isinstance(at, Query) else plain_sum
    return ordinary(loss_fn, at, inputs, targets)  # type: ignore[arg-type]


def _held(
    loss_fn: ModelLoss, at: At, inputs: Tensor, targets: Tensor, expected: Expected | None
) -> dict[str, Contribution]:
    """Contributions of what ``at`` asks for: rows where points are combined or coordinates left out, else as held."""

    def found(point: Params) -> dict[str, Contribution]:
        return per_example(loss_fn, point, inputs, targets, expected)

    if not isinstance(at, Query):
        return found(at)
    (weight, point), *more = at.points
    if more or weight != 1:
        rows = combined(at, lambda p: {n: c.rows() for n, c in found(p).items()})
        return {name: Rows(data=g) for name, g in rows.items()}
    held = found(point)
    for name in (at.active or {}).keys() & held.keys():
        held[name] = Rows(data=compacted(at, {name: held[name].rows()})[name])
    return held


def _clipped_sum(
    held: dict[str, Contribution], zeros: Params, batch: int, clipping: ClippingRule
) -> tuple[Params, int]:
    """Norms, factors, weighted sums; ``held`` is emptied, so that rows go as soon as they are summed."""
    unused = torch.zeros(batch, dtype=torch.float64, device=next(iter(zeros.values())).device)
    norms = {name: held[name].squared_norms() if name in held else unused for name in clipped_names(zeros)}
    factors, finite, nonfinite = finite_factors(norms, clipping)
    total = {}
    for name, zero in zeros.items():
        one = held.pop(name, None)
        total[name] = zero if one is None or name not in factors else one.weighted_sum(factors[name], finite)
    return total, nonfinite


def auto_sum(loss_fn: LossFn, at: At, inputs: Tensor, targets: Tensor, clipping: ClippingRule) -> tuple[Params, int]:
    """``planned_sum`` for a ``ModelLoss``, else ``vmap_sum``."""
    engine = planned_sum if isinstance(loss_fn, ModelLoss) else vmap_sum
    return engine(loss_fn, at, inputs, targets, clipping)


def per_example(
    loss_fn: ModelLoss, params: Params, inputs: Tensor, targets: Tensor, expected: Expected | None = None
) -> dict[str, Contribution]:
    """Per-example gradients by parameter, held as each layer chose; no entry for an unused one.

    Raises ``Unplanned``, with the reason; also for a pass that is not as ``expected``.
    """
    tape = Tape()
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    run(tape, loss_fn, leaves, inputs, targets, expected)
    return _gather(tape, leaves)


def run(
    tape: Tape,
    loss_fn: ModelLoss,
    leaves: Params,
    inputs: Tensor,
    targets: Tensor,
    expected: Expected | None = None,
) -> None:
    """Forward and backward pass of the sum of the losses, recorded on ``tape``."""
    with torch.enable_grad():
        capture, mark = Capture(tape, routes(loss_fn.kernels), len(inputs)), Mark.here(inputs.device)
        with capture:
            losses = loss_fn(leaves, inputs, targets)
        if expected is not None and not expected.holds(capture.course, len(inputs)):
            raise Unplanned(f"a pass that does something else than those on made-up examples: {MAY_MIX}")
        if not losses.requires_grad:
            check_drawn(mark)
            return
        total, wanted = losses.sum(), [capture.anchor, *leaves.values()]
        turn_gradients(total)
        direct = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=False)
    check_drawn(mark)
    check_routed(leaves, direct[1:])


def _gather(tape: Tape, leaves: Params) -> dict[str, Contribution]:
    """The contributions of the tape by parameter; those of one parameter are added up example by example."""
    names = {id(leaf): name for name, leaf in leaves.items()}
    by_name: dict[str, list[Contribution]] = {}
    functions: list[tuple[Tensor, Contribution, str]] = []
    for tensor, contribution, layer in tape.found:
        if (name := names.get(id(tensor))) is not None:
            by_name.setdefault(name, []).append(contribution)
        else:
            functions.append((tensor, contribution, layer))
    for name, more in derived.spread(functions, leaves).items():
        by_name.setdefault(name, []).extend(more)
    return {name: _together(parts) for name, parts in by_name.items()}


def _together(parts: list[Contribution]) -> Contribution:
    return parts[0] if len(parts) == 1 else Rows(data=functools.reduce(torch.add, (part.rows() for part in parts)))


def _fall_back(
    reason: str, loss_fn: ModelLoss, at: At, inputs: Tensor, targets: Tensor, clipping: ClippingRule
) -> tuple[Params, int]:
    _say_once(type(loss_fn.module).__name__, reason)
    return vmap_sum(loss_fn, at, inputs, targets, clipping)


@functools.cache
def _say_once(module: str, reason: str) -> None:
    log.warning("the planned engine uses vmap for %s: %s", module, reason)
