"""The engines: one backward pass, and per parameter the cheapest exact way to norms and weighted sums.

================================================== ==================================================
case                                               what happens
================================================== ==================================================
a parameter that nothing uses                      zeros
a parameter that several layers use                the norm is that of the sum of their gradients
a weight that is a function of parameters          rows through its Jacobian, or what ``derived`` knows better
a parameter outside of layers                      a row of it for each example (``engine="vmap"``: all are so)
a draw, a branch on data, a module that keeps      one pass per example (``loop``), named once in the log
tensors, an operation that ``vmap`` has not
a norm that cancels, or values above 1e8           rows of that example
a rule that bounds nothing                         an ordinary pass (``plain``)
bundles of rows                                    what a layer adds for a bundle, at the positions of all its rows
weighted points, a name with a mask                rows of those parameters, combined, without what is masked
slopes                                             numbers of forward passes, of which no graph is kept
================================================== ==================================================
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fed_dpsat.errors import InputError
from fed_dpsat.params import Params
from fed_dpsat.step.bundles import Bundles
from fed_dpsat.step.clipping import ClippingRule
from fed_dpsat.step.draws import Draws, of_batch
from fed_dpsat.step.examples import Examples, count, device_of, some
from fed_dpsat.step.generators import Mark
from fed_dpsat.step.gradients import loop
from fed_dpsat.step.gradients.capture import Capture, Tape, check_routed
from fed_dpsat.step.gradients.contribution import Contribution, Rows, Unplanned, wide
from fed_dpsat.step.gradients.drawing import check_drawn
from fed_dpsat.step.gradients.finite import clipped_names, finite_factors
from fed_dpsat.step.gradients.formats import FORMATS, laid_out, suits_channels_last, turn_gradients
from fed_dpsat.step.gradients.gathered import gathered
from fed_dpsat.step.gradients.loss import ModelLoss
from fed_dpsat.step.gradients.plain import plain_query_sum, plain_sum, unbounded
from fed_dpsat.step.gradients.routes import TABLES, Routes, routes_of
from fed_dpsat.step.gradients.state import afresh
from fed_dpsat.step.query import (
    At,
    LossFn,
    Query,
    Slope,
    as_query,
    compacted,
    first_point,
    plain_tensors,
    simplified,
    zero_sum,
)


class NoMemory(Exception):
    """Memory does not suffice for so many examples at once; the clipping rule has not been asked."""


def planned_sum(
    loss_fn: LossFn,
    at: At,
    inputs: Examples,
    targets: Examples,
    clipping: ClippingRule,
    bundles: Bundles | None = None,
) -> tuple[Params, int]:
    """Clipped sum over ``inputs[B, ...]``, ``B`` at least 1, and how many examples, or ``bundles``, were not finite."""
    at = simplified(at)
    if isinstance(inputs, Tensor):
        inputs = laid_out(inputs, channels_last(loss_fn, first_point(at), inputs, targets))
    if unbounded(clipping) and (total := _plain(loss_fn, at, inputs, targets, bundles)) is not None:
        return total, 0
    return _sum(loss_fn, at, inputs, targets, clipping, bundles, routes_of(loss_fn))


def vmap_sum(
    loss_fn: LossFn,
    at: At,
    inputs: Examples,
    targets: Examples,
    clipping: ClippingRule,
    bundles: Bundles | None = None,
) -> tuple[Params, int]:
    """The same with a row of every parameter for each example, but tables: ``vmap`` forgets about ``padding_idx``."""
    return _sum(loss_fn, simplified(at), inputs, targets, clipping, bundles, TABLES)


def _sum(
    loss_fn: LossFn,
    at: At,
    inputs: Examples,
    targets: Examples,
    clipping: ClippingRule,
    bundles: Bundles | None,
    plan: Routes,
) -> tuple[Params, int]:
    held = _held(loss_fn, at, inputs, targets, plan, bundles)
    return _clipped_sum(held, zero_sum(at), len(bundles.weights) if bundles else count(targets), clipping)


def _plain(loss_fn: LossFn, at: At, inputs: Examples, targets: Examples, bundles: Bundles | None) -> Params | None:
    if loop.needed(loss_fn):
        return None
    ordinary = plain_query_sum if isinstance(at, Query) else plain_sum
    return ordinary(loss_fn, at, inputs, targets, bundles)  # type: ignore[arg-type]


def _held(
    loss_fn: LossFn, at: At, inputs: Examples, targets: Examples, plan: Routes, bundles: Bundles | None
) -> dict[str, Contribution]:
    """Contributions of what ``at`` asks for; by a ``loop`` if one pass cannot keep the examples apart."""
    query, begun = as_query(at), loop.Begun(loss_fn)
    loss, draws = query.loss(begun) if query.loss else begun, of_batch(count(targets))
    if not loop.needed(loss_fn):
        mark = Mark.here(device_of(targets))
        try:
            if query.slopes:
                return _of_slopes(
                    query.slopes, lambda point: losses_at(loss, point, inputs, targets, plan, begun), bundles
                )
            loop.check_repeats(loss, begun, query.points[0][1], inputs, targets, draws)
            return _asked(at, lambda point: per_example(loss, point, inputs, targets, plan, begun, bundles))
        except Unplanned as unplanned:
            reason = str(unplanned)
        except InputError:
            raise
        except Exception as error:  # what is no fault of the pass is raised again by those of single examples
            if _is_of_memory(error):
                if count(targets) == (bundles.rows if bundles else 1):
                    raise
                raise NoMemory from error
            said = str(error).strip().splitlines()
            reason = f"vmap refuses it: {said[0] if said else type(error).__name__}"
        mark.moved()  # whatever was drawn, it is as if nothing was
        loop.remember(loss_fn, reason)
    if query.slopes:
        return _of_slopes(query.slopes, loop.losses(loss, begun, draws, inputs, targets), bundles)
    rows = combined(query, loop.gradients(loss, begun, draws, inputs, targets))
    return {name: Rows(data=g if bundles is None else bundles.sums(g)) for name, g in rows.items()}


def _of_slopes(
    slopes: Mapping[str, Slope], losses: Callable[[Params], Tensor], bundles: Bundles | None
) -> dict[str, Contribution]:
    """A number for each example, or bundle, and slope, of the ``losses[B]`` at its points."""
    found: dict[str, Contribution] = {}
    for name, slope in slopes.items():
        each = []
        for weight, point in slope.points():
            each.append(float(weight) * wide(losses(plain_tensors(point))))
            del point  # or the next one is made beside it
        total = torch.stack(each).sum(0)
        total = total if bundles is None else bundles.sums(total)
        found[name] = Rows(data=total * (total.new_ones(()) / slope.width))
    return found


def _is_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _asked(at: At, found: Callable[[Params], dict[str, Contribution]]) -> dict[str, Contribution]:
    """Rows where points are combined or coordinates left out, else contributions as they are held."""
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


def combined(query: Query, gradients: Callable[[Params], Params]) -> Params:
    """Rows ``[B, *shape]`` of the weighted sum over points of what ``gradients`` finds; with a mask ``[B, active]``."""
    total: Params = {}
    for weight, point in query.points:
        for name, g in compacted(query, gradients(point)).items():
            if name in total:
                total[name] = torch.add(total[name], g, alpha=weight)
            else:
                total[name] = g if weight == 1 else g * weight
    return total


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


def per_example(
    loss_fn: LossFn,
    params: Params,
    inputs: Examples,
    targets: Examples,
    plan: Routes,
    begun: loop.Begun | None = None,
    bundles: Bundles | None = None,
) -> dict[str, Contribution]:
    """Per-example gradients, or those of ``bundles``, by parameter, held as each layer chose; none for an unused one.

    Raises ``Unplanned``, with the reason.
    """
    tape = Tape(bundles=bundles)
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    run(tape, loss_fn, leaves, inputs, targets, plan, begun)
    return gathered(tape, leaves)


def run(
    tape: Tape,
    loss_fn: LossFn,
    leaves: Params,
    inputs: Examples,
    targets: Examples,
    plan: Routes,
    begun: loop.Begun | None = None,
) -> None:
    """Forward and backward pass of the sum of the losses, recorded on ``tape``."""
    with torch.enable_grad():
        capture, mark = Capture(count(targets), plan, tape), Mark.here(device_of(targets))
        if begun is not None:
            begun.begin = capture.drawn.begin
        with begun_afresh(loss_fn, begun) as own:
            losses = capture.losses(own, leaves, inputs, targets)
        check_drawn(mark)
        if not losses.requires_grad:
            return
        losses = losses if tape.bundles is None else tape.bundles.weighted(losses)
        total, wanted = losses.sum(), [capture.anchor, *leaves.values()]
        turn_gradients(total)
        direct = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=False)
    check_drawn(mark)
    check_routed(leaves, direct[1:])


def losses_at(
    loss_fn: LossFn, params: Params, inputs: Examples, targets: Examples, plan: Routes, begun: loop.Begun
) -> Tensor:
    """Losses ``[B]`` of one forward pass, as ``run`` computes them, without a graph."""
    loop.check_repeats(loss_fn, begun, params, inputs, targets, of_batch(count(targets)))
    capture, mark = Capture(count(targets), plan, Tape(), learns=False), Mark.here(device_of(targets))
    begun.begin = capture.drawn.begin
    with begun_afresh(loss_fn, begun) as own:
        losses = capture.losses(own, {name: p.detach() for name, p in params.items()}, inputs, targets).detach()
    check_drawn(mark)
    return losses


@contextmanager
def begun_afresh(loss_fn: LossFn, begun: loop.Begun | None) -> Iterator[LossFn]:
    """``loss_fn``, which may have been made of ``begun``, for one pass that begins with the state of the call."""
    if begun is None:
        with afresh(loss_fn) as own:
            yield own
        return
    whole = begun.loss_fn
    try:
        with afresh(whole) as begun.loss_fn:
            yield loss_fn
    finally:
        begun.loss_fn = whole


_formats: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], bool]] = weakref.WeakKeyDictionary()


def channels_last(loss_fn: LossFn, params: Params, inputs: Tensor, targets: Examples) -> bool:
    """Which memory format suits the layers, by a pass over zeros: the answer depends on shapes alone."""
    if not isinstance(loss_fn, ModelLoss) or inputs.ndim not in FORMATS:
        return False
    formats, key = _formats.setdefault(loss_fn.module, {}), (inputs.shape[1:], inputs.dtype, inputs.device, *params)
    if key not in formats:
        tape, mark = Tape(keep_calls=True), Mark.here(inputs.device)
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        with torch.enable_grad(), Draws.fresh(1).used(), afresh(loss_fn) as own, suppress(Exception):
            # the pass over the examples raises it again
            capture = Capture(1, routes_of(loss_fn), tape)
            capture.losses(
                own, leaves, torch.zeros_like(inputs[:1]), tree_map(torch.zeros_like, some(targets, slice(1)))
            )
        mark.moved()
        formats[key] = suits_channels_last(tape.calls, capture.functions)
    return formats[key]
