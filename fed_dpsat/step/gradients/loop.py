"""One example after the other, by itself: right for any module, also for one that draws as it likes.

Each example draws what it draws in a pass over a batch, and has torch's generators and those of ``random`` and
``numpy.random`` seeded for what else it draws. It has a copy of the module, so that nothing that a module writes into
itself goes from one example to the next. A tensor that it keeps elsewhere does not go either: a pass refuses those of
another.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fed_dpsat.errors import ModelError
from fed_dpsat.params import Params
from fed_dpsat.step.draws import Draws
from fed_dpsat.step.examples import Examples, device_of, some
from fed_dpsat.step.generators import kept, seed
from fed_dpsat.step.gradients.alone import Alone
from fed_dpsat.step.gradients.contribution import Unplanned
from fed_dpsat.step.gradients.loss import ModelLoss
from fed_dpsat.step.gradients.state import copied
from fed_dpsat.step.placement import exact
from fed_dpsat.step.query import LossFn

log = logging.getLogger("fed_dpsat")


_reasons: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()
_repeats: weakref.WeakSet[object] = weakref.WeakSet()


def needed(loss_fn: LossFn) -> bool:
    """Whether ``loss_fn`` was found to need it."""
    return _key(loss_fn) in _reasons


def remember(loss_fn: LossFn, reason: str) -> None:
    """Never try ``loss_fn`` another way again; the log says why, once."""
    _reasons[_key(loss_fn)] = reason
    _say_once(_name(loss_fn), reason)


class Begun:
    """``loss_fn``, whose every call ``begin``s an example's draws anew: its loss is one function at all points."""

    def __init__(self, loss_fn: LossFn) -> None:
        self.loss_fn = loss_fn
        self.begin: Callable[[], None] = lambda: None
        if hasattr(loss_fn, "criterion") and hasattr(loss_fn, "outputs"):  # quicker than isinstance of a protocol
            self.criterion, self.outputs = loss_fn.criterion, self._outputs

    def __call__(self, params: Params, inputs: Examples, targets: Examples, /) -> Tensor:
        """The losses of ``loss_fn``."""
        self.begin()
        return self.loss_fn(params, inputs, targets)

    def _outputs(self, params: Params, inputs: Tensor, /) -> Tensor:
        self.begin()
        outputs: Tensor = self.loss_fn.outputs(params, inputs)  # type: ignore[attr-defined]
        return outputs


def gradients(
    loss: LossFn, begun: Begun, draws: Draws, inputs: Examples, targets: Examples
) -> Callable[[Params], Params]:
    """At a point, the gradients ``[B, *shape]`` of ``loss``, which was made of ``begun``; raises as ``_each`` does."""

    def of_all(point: Params) -> Params:
        leaves = {name: p.detach().requires_grad_() for name, p in point.items()}
        rows: dict[str, list[Tensor]] = {name: [] for name in leaves}

        def see(found: Tensor) -> None:
            for name, g in _gradient(found.sum(), leaves, begun).items():
                rows[name].append(g)

        with torch.enable_grad():
            _each(loss, begun, draws, inputs, targets, leaves, see)
        return {name: torch.stack(each) for name, each in rows.items()}

    return of_all


def losses(loss: LossFn, begun: Begun, draws: Draws, inputs: Examples, targets: Examples) -> Callable[[Params], Tensor]:
    """At a point, the losses ``[B]``, of which no graph is kept; raises as ``_each`` does."""

    def of_all(point: Params) -> Tensor:
        found: list[Tensor] = []
        with torch.no_grad():
            _each(loss, begun, draws, inputs, targets, point, lambda one: found.append(one.view(1)))
        return torch.cat(found)

    return of_all


def _each(
    loss: LossFn,
    begun: Begun,
    draws: Draws,
    inputs: Examples,
    targets: Examples,
    point: Params,
    see: Callable[[Tensor], None],
) -> None:
    """Call ``see`` with the loss ``[1]`` of one example after the other at ``point``, each within its pass.

    Raises ``ModelError`` for a loss that keeps something: a tensor of another example, or anything at all that shows in
    the first example's loss after the others.
    """
    check_repeats(loss, begun, point, inputs, targets, draws)
    losses: list[Tensor] = []
    size = len(draws)
    with kept(device_of(inputs)), exact(device_of(inputs)):
        for i in [*range(size), 0]:
            one = slice(i, i + 1)
            with _copied(begun), _alone(begun, device_of(inputs), draws.some(one)):
                found = loss(point, some(inputs, one), some(targets, one))
                losses.append(found.detach())
                if len(losses) <= size:
                    see(found)
    _check_same(begun, losses[0], losses[-1])


def check_repeats(loss: LossFn, begun: Begun, point: Params, inputs: Examples, targets: Examples, draws: Draws) -> None:
    """Once per module, for the first example: raises ``ModelError`` if two passes with equal seeds differ."""
    subject = _subject(begun.loss_fn)
    if _key(begun.loss_fn) in _repeats:
        return
    losses, first = [], slice(1)
    leaves = {name: p.detach().requires_grad_() for name, p in point.items()}
    with kept(device_of(inputs)), torch.enable_grad(), _copied(begun):
        for _ in range(2):
            with _alone(begun, device_of(inputs), draws.some(first)):
                losses.append(loss(leaves, some(inputs, first), some(targets, first)).detach())
    _check_same(begun, *losses)
    if _key(begun.loss_fn) is subject:
        _repeats.add(subject)


def _check_same(begun: Begun, first: Tensor, second: Tensor) -> None:
    if not torch.allclose(first, second, rtol=1e-4, atol=1e-6, equal_nan=True):
        raise ModelError(
            f"{_name(begun.loss_fn)} draws from a generator of its own, or keeps a state: two passes over one example "
            "with equal seeds differ; draw from torch, random or numpy.random without a generator, which are seeded "
            "for each example"
        )


@contextmanager
def _alone(begun: Begun, device: torch.device, draws: Draws) -> Iterator[None]:
    """For one pass, forward and backward: ``draws`` of one example, by which all generators are seeded too.

    Raises ``ModelError`` for a tensor that another pass made.
    """
    alone, (value,) = Alone(draws), draws.seeds()

    def begin() -> None:
        seed(device, value)
        alone.drawn.begin()

    begun.begin = begin
    begin()
    try:
        with alone:
            yield
    except Unplanned as kept_one:
        raise ModelError(f"{_name(begun.loss_fn)}: {kept_one}") from None


@contextmanager
def _copied(begun: Begun) -> Iterator[None]:
    """Within it modules are copies with the same parameters; raises ``ModelError`` for one that cannot be copied."""
    whole = begun.loss_fn
    begun.loss_fn = copied(whole)
    try:
        yield
    finally:
        begun.loss_fn = whole


def _gradient(loss: Tensor, leaves: Params, begun: Begun) -> Params:
    if not loss.requires_grad:
        return {name: torch.zeros_like(p) for name, p in leaves.items()}
    try:
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ModelError(f"{_name(begun.loss_fn)} has a reentrant checkpoint; use use_reentrant=False") from None
    return dict(zip(leaves, found, strict=True))


def _subject(loss_fn: LossFn) -> object:
    return loss_fn.module if isinstance(loss_fn, ModelLoss) else loss_fn


def _key(loss_fn: LossFn) -> object:
    """What is remembered by: the type, for an object that no dictionary holds."""
    subject = _subject(loss_fn)
    try:
        hash(subject)
        weakref.ref(subject)
    except TypeError:
        return type(subject)
    return subject


def _name(loss_fn: LossFn) -> str:
    subject = _subject(loss_fn)
    return type(subject).__name__ if isinstance(loss_fn, ModelLoss) else getattr(subject, "__name__", repr(subject))


@functools.cache
def _say_once(name: str, reason: str) -> None:
    log.warning("%s has one pass per example, which is slow: %s", name, reason)
