"""The planned engine: one backward pass, and per layer the cheapest exact way to norms and weighted sums.

================================================== ==================================================
case                                               what happens
================================================== ==================================================
a parameter that no planned layer uses             zeros
a parameter that several layers use                the norm is that of the sum of their rows
a weight that is a function of parameters          rows through its Jacobian
a layer it does not know, or that mixes examples   ``vmap`` for the whole module, named once in the log
a norm that cancels, or values above 1e8            rows of that example
================================================== ==================================================
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from fed_dpsat.clipping import ClippingRule
from fed_dpsat.engines import derived
from fed_dpsat.engines.capture import Capture, Tape
from fed_dpsat.engines.contribution import Contribution, Rows, Unplanned
from fed_dpsat.engines.finite import finite_factors
from fed_dpsat.engines.loss import LossFn, ModelLoss
from fed_dpsat.engines.probe import refusal
from fed_dpsat.engines.routes import ROUTES
from fed_dpsat.engines.vmap import vmap_sum
from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params

log = logging.getLogger("fed_dpsat")


def planned_sum(
    loss_fn: LossFn, params: Params, inputs: Tensor, targets: Tensor, clipping: ClippingRule
) -> tuple[Params, int]:
    """Clipped sum over ``inputs[B, ...]``, ``B`` at least 1, and how many examples were not finite.

    Raises ``SettingError`` for a loss that is not a ``ModelLoss``: there are no layers to plan for.
    """
    if not isinstance(loss_fn, ModelLoss):
        raise SettingError("engine", "planned", "for a loss other than ModelLoss", "use 'auto' or 'vmap'")
    if reason := refusal(loss_fn, params, inputs, targets):
        return _fall_back(reason, loss_fn, params, inputs, targets, clipping)
    try:
        contributions = per_example(loss_fn, params, inputs, targets)
    except Unplanned as reason:
        return _fall_back(str(reason), loss_fn, params, inputs, targets, clipping)
    norms = {name: c.squared_norms() for name, c in contributions.items()}
    some = next(iter(norms.values()), inputs.new_zeros(len(inputs)))
    factors, finite, nonfinite = finite_factors(
        {name: norms[name] if name in norms else torch.zeros_like(some) for name in params}, clipping
    )
    return {
        name: contributions[name].weighted_sum(factors[name], finite) if name in contributions else torch.zeros_like(p)
        for name, p in params.items()
    }, nonfinite


def auto_sum(
    loss_fn: LossFn, params: Params, inputs: Tensor, targets: Tensor, clipping: ClippingRule
) -> tuple[Params, int]:
    """``planned_sum`` for a ``ModelLoss``, else ``vmap_sum``."""
    engine = planned_sum if isinstance(loss_fn, ModelLoss) else vmap_sum
    return engine(loss_fn, params, inputs, targets, clipping)


def per_example(loss_fn: ModelLoss, params: Params, inputs: Tensor, targets: Tensor) -> dict[str, Contribution]:
    """Per-example gradients by parameter, held as each layer chose; no entry for an unused one.

    Raises ``Unplanned``, with the reason.
    """
    tape = Tape()
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    run(tape, loss_fn, leaves, inputs, targets)
    return _gather(tape, leaves)


def run(tape: Tape, loss_fn: ModelLoss, leaves: Params, inputs: Tensor, targets: Tensor) -> None:
    """Forward and backward pass of the sum of the losses, recorded on ``tape``."""
    with torch.enable_grad():
        capture = Capture(tape, ROUTES, len(inputs))
        with capture:
            losses = loss_fn(leaves, inputs, targets)
        if not losses.requires_grad:
            return
        wanted = [capture.anchor, *leaves.values()]
        direct = torch.autograd.grad(losses.sum(), wanted, allow_unused=True, materialize_grads=False)
    used = [name for name, g in zip(leaves, direct[1:], strict=True) if g is not None]
    if used:
        raise Unplanned(f"parameter {used[0]} is used outside linear, conv, norm and embedding layers")


def _gather(tape: Tape, leaves: Params) -> dict[str, Contribution]:
    """The contributions of the tape by parameter; those of one parameter are added up example by example."""
    names = {id(leaf): name for name, leaf in leaves.items()}
    by_name: dict[str, list[Contribution]] = {}
    functions: list[tuple[Tensor, Contribution]] = []
    for tensor, contribution, call in tape.found:
        if (name := names.get(id(tensor))) is not None:
            by_name.setdefault(name, []).append(contribution)
        else:
            derived.leaves_of(tensor, call.name)
            functions.append((tensor, contribution))
    for name, more in derived.spread(functions, leaves).items():
        by_name.setdefault(name, []).extend(more)
    return {name: _together(parts) for name, parts in by_name.items()}


def _together(parts: list[Contribution]) -> Contribution:
    return parts[0] if len(parts) == 1 else Rows(data=functools.reduce(torch.add, (part.rows() for part in parts)))


def _fall_back(
    reason: str, loss_fn: ModelLoss, params: Params, inputs: Tensor, targets: Tensor, clipping: ClippingRule
) -> tuple[Params, int]:
    _say_once(type(loss_fn.module).__name__, reason)
    return vmap_sum(loss_fn, params, inputs, targets, clipping)


@functools.cache
def _say_once(module: str, reason: str) -> None:
    log.warning("the planned engine uses vmap for %s: %s", module, reason)
