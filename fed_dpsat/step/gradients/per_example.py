"""Sums of clipped per-example gradients: one interface, several engines.

=========================== ============================================
case                        result
=========================== ============================================
empty batch                 zeros
an example with NaN or inf  contributes zero, and is counted
physical batches            the sum over chunks, up to rounding
a frozen parameter          not in ``at``, so not in the sum
=========================== ============================================
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fed_dpsat.errors import SettingError, warn_once
from fed_dpsat.params import Params
from fed_dpsat.step.bundles import Bundles
from fed_dpsat.step.clipping import ClippingRule
from fed_dpsat.step.clipping.bound import held
from fed_dpsat.step.draws import Draws
from fed_dpsat.step.examples import Examples, count, device_of, some
from fed_dpsat.step.generators import borrowed
from fed_dpsat.step.gradients.loss import ModelLoss, check_module, check_types, cross_entropy
from fed_dpsat.step.gradients.opacus import opacus_sum
from fed_dpsat.step.gradients.planned import NoMemory, planned_sum, vmap_sum
from fed_dpsat.step.query import At, LossFn, first_point, simplified, zero_sum

__all__ = ["ENGINES", "LossFn", "ModelLoss", "check_module", "clipped_gradient_sum", "cross_entropy"]

Engine = Callable[..., tuple[Params, int]]
"""Of a loss, a point or query, inputs, targets and a clipping rule; those here also take ``Bundles`` or None."""

ENGINES: dict[str, Engine] = {"auto": planned_sum, "vmap": vmap_sum, "planned": planned_sum, "opacus": opacus_sum}


def clipped_gradient_sum(
    loss_fn: LossFn,
    at: At,
    batch: tuple[Examples, Examples],
    clipping: ClippingRule,
    *,
    engine: str = "auto",
    physical_batch_size: int = 128,
    draws: Draws | None = None,
    bundles: Bundles | None = None,
) -> tuple[Params, int]:
    """Sum of clipped gradients, one per example of ``(inputs[B, ...], targets[B])``; a sum, not a mean.

    Both may be trees of tensors that begin with the batch: a module is given a dictionary as its keyword arguments, a
    tuple or a list as its arguments.

    ``at`` is where gradients are taken, or a ``Query``; then a name with a mask has the vector of its active
    coordinates, and ``query.spread`` undoes that once noise is in. Also returns how many examples had a gradient that
    was not finite. Both are sensitive: noise comes next.
    At most ``physical_batch_size`` per-example gradients are held at a time; the split changes nothing else. If the
    machine has no memory for that many, it is half of them, and so on.
    With ``bundles``, ``B`` is G * R, the weighted sum over the R rows of a bundle is clipped in place of each gradient,
    bundles are counted, and each is in one chunk, also if it has more rows than that.
    ``draws`` is what models with dropout and the like draw, example by example; without it, by position, under a key
    that no other call repeats. torch's, Python's and numpy's generators are afterwards where they were.
    Raises ``SettingError`` for a rule whose factors do not keep ``clipping.clip_norm``, and ``ModelError`` for
    parameters of less than float32.
    """
    if engine not in ENGINES:
        raise SettingError("engine", engine, f"one of {', '.join(ENGINES)}", "choose one of those")
    if physical_batch_size < 1:
        raise SettingError("physical_batch_size", physical_batch_size, "at least 1", "128 suits most CPUs")
    clipping = held(clipping)
    at, clipped_sum = simplified(at), dict[str, Tensor]()
    check_types(first_point(at))
    num_nonfinite = 0
    inputs, targets = batch
    size = count(inputs)
    if size != count(targets):
        raise ValueError(f"batch of {size} inputs and {count(targets)} targets: their sizes differ")
    draws = Draws.fresh(size) if draws is None else draws
    if len(draws) != size:
        raise ValueError(f"draws of {len(draws)} examples for a batch of {size}")
    rows = bundles.rows if bundles else 1
    if bundles and bundles.weights.numel() != size:
        raise ValueError(f"{list(bundles.weights.shape)} rows of bundles for a batch of {size}")
    start, step = 0, max(1, physical_batch_size // rows)
    with borrowed(device_of(inputs)):
        while start < size:
            part = slice(start, start + step * rows)
            some_bundles = bundles.some(part) if bundles else None
            try:
                with draws.some(part).used():
                    x, y = some(inputs, part), some(targets, part)
                    chunk, nonfinite = ENGINES[engine](loss_fn, at, x, y, clipping, some_bundles)
            except NoMemory:
                tried = min(step, (size - start) // rows)
                step = (tried + 1) // 2
                warn_once(f"no memory for {tried * rows} per-example gradients at a time: trying {step * rows}")
                continue
            start += step * rows
            num_nonfinite += nonfinite
            clipped_sum = {name: clipped_sum[name].add_(c) for name, c in chunk.items()} if clipped_sum else chunk
    return clipped_sum or zero_sum(at), num_nonfinite
