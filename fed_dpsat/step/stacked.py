"""Clients trained together: parameters and states stacked, one kernel for the examples of all (``torch.func.vmap``).

Everything that makes a client's round private stays that of the client: its coins, its noise, its mechanism, the
factors of its own examples. What clients share is arithmetic, and no kernel sums over clients.

============================================== ==========================================================
case                                           what happens
============================================== ==========================================================
batches of different sizes                     padded with examples of zeros, which add exactly nothing,
                                               also where their gradient is NaN
an empty batch                                 a zero sum, noised like any other
an example with NaN or inf                     contributes zero, and is counted for its client
a module that keeps something                  each pass begins with what was there before the first
an optimizer that cannot be mapped             its two functions are called client by client
a loss or rule that cannot be mapped, or that  ``Unstackable``
carries something from example to example
(a caught error, a hook, a function of its own)
dropout, or another draw of loss or batches    ``Unstackable``
an optimizer that asks a ``Query``             ``Unstackable``, unless it is one plain point
============================================== ==========================================================

The result of a client differs in its last bits from that alone: sums are added up in another order, which depends on
how many examples the largest batch of the stack has.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.utils.rnn import pad_sequence

from fed_dpsat.errors import InputError
from fed_dpsat.params import Params, flatten, map_tree
from fed_dpsat.step.clipping import AdaptiveClipping, ClippingRule
from fed_dpsat.step.clipping.bound import Held, bounded_factors
from fed_dpsat.step.draws import Draws
from fed_dpsat.step.generators import Mark, borrowed, others_moved
from fed_dpsat.step.gradients import loop
from fed_dpsat.step.gradients.contribution import Unplanned
from fed_dpsat.step.gradients.finite import squared_norm_rows
from fed_dpsat.step.gradients.loss import check_types
from fed_dpsat.step.gradients.passes import InPass, check_backward
from fed_dpsat.step.gradients.skipped import ask_no_batch
from fed_dpsat.step.gradients.state import afresh
from fed_dpsat.step.loop import Member, Turn, check_rows
from fed_dpsat.step.optimizers.base import PrivateOptimizer, State, StepInfo
from fed_dpsat.step.query import At, LossFn, Query, simplified


class Unstackable(Exception):
    """Something that clients cannot be trained together with; the message says what, and nothing was released."""


def alike(member: Member) -> Hashable:
    """Equal for members that can be stacked: one round and step, and states of one form."""
    return _form(member.state), member.first_step, member.streams.round


def _form(state: State) -> Hashable:
    return tuple(sorted((path, tuple(t.shape), str(t.dtype)) for path, t in flatten(state).items()))


class Stacked:
    """An ``Executor`` for members of one form: each trains as alone, to 1e-6 relative.

    At most ``physical_batch_size`` per-example gradients are held at a time, but one per client at least. Raises
    ``Unstackable``. Engines are for clients alone.
    """

    def __init__(
        self,
        params: Params,
        members: Sequence[Member],
        *,
        loss_fn: LossFn,
        optimizer: PrivateOptimizer,
        clipping: ClippingRule,
        device: torch.device,
        engine: str,
        physical_batch_size: int,
        watched: bool,
    ) -> None:
        if isinstance(clipping, AdaptiveClipping):
            raise Unstackable("adaptive clipping, whose bound is another one for each client")
        if len({alike(member) for member in members}) != 1:
            raise Unstackable("clients in different rounds, or with states of different forms")
        check_types(params)
        own = _stacked([member.own for member in members])
        self._stack = {
            name: own[name] if name in own else p.expand(len(members), *p.shape) for name, p in params.items()
        }
        self._state = _stacked([member.state for member in members])
        mechanism = members[0].mechanism
        self._clipping = Held(rule=clipping, clip_norm=mechanism.clip_norm, norm=mechanism.norm)
        self._members, self._loss_fn, self._device, self._size = members, loss_fn, device, physical_batch_size
        self._optimizer = _Optimizer(optimizer, _Draws(members))

    def batches(self, step: int, indices: Sequence[Tensor]) -> Sequence[tuple[Tensor, Tensor]]:
        """The batch of each member."""
        return [_batch(member, drawn, self._device) for member, drawn in zip(self._members, indices, strict=True)]

    def query_point(self, infos: Sequence[StepInfo]) -> Params:
        """A stack of points."""
        return self._optimizer.query_point(self._stack, self._state, infos)

    def clipped_sums(
        self, at: At, batches: Sequence[tuple[Tensor, Tensor]], turns: Sequence[Turn]
    ) -> Sequence[tuple[Params, int]]:
        """As ``stacked_sum``, member by member."""
        sums, nonfinite = stacked_sum(self._loss_fn, _point(at), *_padded(batches), self._clipping, self._size)
        return [(_at(sums, k), skipped) for k, skipped in enumerate(nonfinite.cpu().tolist())]

    def update(self, private_gradients: Sequence[Params], infos: Sequence[StepInfo]) -> None:
        """The step of each member."""
        self._stack, self._state = self._optimizer.update(self._stack, _stacked(private_gradients), self._state, infos)
        if others_moved():
            raise Unstackable("an optimizer that draws from random or numpy.random")

    def part(self, k: int) -> tuple[Params, State]:
        """Parameters and state of a member."""
        return _own(_at(self._stack, k)), _own(_at(self._state, k))


def stacked_sum(
    loss_fn: LossFn,
    params: Params,
    inputs: Tensor,
    targets: Tensor,
    real: Tensor,
    clipping: ClippingRule,
    physical_batch_size: int = 128,
) -> tuple[Params, Tensor]:
    """Clipped sums ``[K, *shape]`` at ``params[K, *shape]`` over ``inputs[K, B, ...]``, and nonfinite counts ``[K]``.

    Only the examples that are ``real[K, B]`` are in the sums and counts. Raises ``Unstackable``, and ``ModelError`` for
    a loss that answers the same example differently a second time.
    """
    ask_no_batch()
    if loop.needed(loss_fn):
        raise Unstackable("the loss, which has a pass for each example")
    if real.numel():
        one = {name: p[0] for name, p in params.items()}
        loop.check_repeats(loss_fn, loop.Begun(loss_fn), one, inputs[0, :1], targets[0, :1], Draws.fresh(1))
    count = len(real)
    width = max(1, physical_batch_size // count)
    total = {name: torch.zeros_like(p, memory_format=torch.contiguous_format) for name, p in params.items()}
    nonfinite = torch.zeros(count, dtype=torch.int64, device=real.device)
    chunks = (torch.split(t, width, dim=1) for t in (inputs, targets, real))
    with borrowed(real.device):
        for x, y, r in zip(*chunks, strict=True):
            if r.shape[1]:
                chunk, skipped = _chunk_sum(loss_fn, params, x, y, r, clipping)
                total = {name: total[name] + c for name, c in chunk.items()}
                nonfinite += skipped
    return total, nonfinite


def _chunk_sum(
    loss_fn: LossFn, params: Params, inputs: Tensor, targets: Tensor, real: Tensor, clipping: ClippingRule
) -> tuple[Params, Tensor]:
    gradients = _gradients(loss_fn, params, inputs, targets)
    rows = {name: g.reshape(*real.shape, -1) for name, g in gradients.items()}
    norms = {name: squared_norm_rows(g.flatten(0, 1)).view(real.shape) for name, g in rows.items()}
    finite = torch.stack(list(norms.values())).sum(0).isfinite()
    kept = real & finite
    known = {name: n.where(kept, 0) for name, n in norms.items()}
    held = torch.stack(list(known.values()))  # before the rule has them
    factors = bounded_factors(clipping, known, held, partial(_mapped, clipping.factors, "the clipping rule"))
    if not bool(finite.all()):  # 0 * inf is NaN
        rows = {name: g.where(finite[..., None], 0) for name, g in rows.items()}
    sums = {
        name: torch.bmm(factors[name].where(kept, 0).to(g)[:, None], g).view_as(params[name])
        for name, g in rows.items()
    }
    return sums, (real & ~finite).sum(1)


def _gradients(loss_fn: LossFn, params: Params, inputs: Tensor, targets: Tensor) -> Params:
    """Per-example gradients ``[K, B, *shape]`` of one pass over all examples of all clients."""
    mark = Mark.here(inputs.device)
    with afresh(loss_fn) as own:
        seen = _Pass()

        def loss_of_one(p: Params, x: Tensor, y: Tensor) -> Tensor:
            given = seen.made((p, x[None], y[None]))
            with seen:
                loss = own(*given)
            seen.check_own(loss, own)
            return loss.squeeze(0)

        of_client = vmap(grad(loss_of_one), in_dims=(None, 0, 0))
        gradients: Params = _mapped(of_client, "the loss", params, inputs, targets)
    if seen.raised:
        raise Unstackable(f"the loss, which catches an error of {seen.raised}")
    if mark.moved():
        raise Unstackable("the loss, which draws random numbers")
    return gradients


class _Pass(InPass):
    """Refuses what ``vmap`` does not: code of a module's own that sees all examples, now or in the backward pass."""

    def call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Tensor]
    ) -> Any:
        """Torch's answer."""
        check_backward(func, args)
        return func(*args, **kwargs)


def _mapped(function: Callable[..., Any], what: str, *arguments: Any) -> Any:
    """``function`` of each client's own row; ``Unstackable`` if it cannot be mapped, or fails for a single client."""
    try:
        return vmap(function)(*arguments)
    except InputError:
        raise
    except Unplanned as unplanned:
        raise Unstackable(f"{what}, which has {unplanned}") from None
    except Exception as error:  # a fault of its own is raised again by the client alone
        said = str(error).strip().splitlines()
        raise Unstackable(f"{what}, which vmap refuses: {said[0] if said else type(error).__name__}") from error


class _Draws:
    """Torch's own generator, client by client, as each would find it alone."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._states = []
        for member in members:
            torch.default_generator.manual_seed(member.streams.torch_seed())
            self._states.append(torch.get_rng_state())

    @contextmanager
    def of(self, k: int) -> Iterator[None]:
        torch.set_rng_state(self._states[k])
        yield
        self._states[k] = torch.get_rng_state()


class _Optimizer:
    """Both functions of ``optimizer`` on stacks: mapped over clients, or client by client if it cannot be."""

    def __init__(self, optimizer: PrivateOptimizer, draws: _Draws) -> None:
        self._optimizer, self._draws, self._maps = optimizer, draws, True

    def query_point(self, params: Params, state: State, infos: Sequence[StepInfo]) -> Params:
        if self._maps:
            try:
                return vmap(
                    lambda p, s, std: _point(self._optimizer.query_point(p, s, replace(infos[0], noise_std=std)))
                )(params, state, _stds(infos))
            except Unstackable:
                raise
            except Exception:  # whatever it is, it is raised again where it does not come of the mapping
                self._maps = False
        return _stacked([self._asked(k, params, state, info) for k, info in enumerate(infos)])

    def update(
        self, params: Params, private_gradient: Params, state: State, infos: Sequence[StepInfo]
    ) -> tuple[Params, State]:
        if self._maps:
            try:
                moved, after = vmap(
                    lambda p, g, s, std: self._optimizer.update(p, g, s, replace(infos[0], noise_std=std))
                )(params, private_gradient, state, _stds(infos))
                return moved, after
            except Exception:
                self._maps = False
        each = [self._moved(k, params, private_gradient, state, info) for k, info in enumerate(infos)]
        if len({_form(after) for _, after in each}) != 1:
            raise Unstackable("an optimizer that leaves states of different forms")
        return _stacked([moved for moved, _ in each]), _stacked([after for _, after in each])

    def _asked(self, k: int, params: Params, state: State, info: StepInfo) -> Params:
        with self._draws.of(k):
            return _point(self._optimizer.query_point(_own(_at(params, k)), _own(_at(state, k)), info))

    def _moved(
        self, k: int, params: Params, private_gradient: Params, state: State, info: StepInfo
    ) -> tuple[Params, State]:
        with self._draws.of(k):
            own = [_own(_at(tree, k)) for tree in (params, private_gradient, state)]  # a view leads to all members
            return self._optimizer.update(own[0], own[1], own[2], info)


def _stds(infos: Sequence[StepInfo]) -> Tensor:
    """``[K]``: the one thing in which the steps of clients differ."""
    return torch.stack([info.noise_std for info in infos])


def _point(at: At) -> Params:
    at = simplified(at)
    if isinstance(at, Query):
        raise Unstackable("an optimizer that asks for more than one plain gradient")
    return at


def _batch(member: Member, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    mark = Mark.here(device)
    batch = member.batches(indices)
    if mark.moved():
        raise Unstackable("batches that draw random numbers")
    if not isinstance(batch[0], Tensor):
        raise Unstackable("examples of several arrays, whose sizes may differ between clients")
    check_rows(batch, indices)
    return batch


def _padded(batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """``inputs[K, B, ...]``, ``targets[K, B, ...]``, and which of them are there, ``real[K, B]``."""
    inputs, targets = (pad_sequence([batch[i] for batch in batches], batch_first=True) for i in (0, 1))
    sizes = torch.tensor([len(y) for _, y in batches], device=targets.device)
    return inputs, targets, torch.arange(targets.shape[1], device=targets.device) < sizes[:, None]


def _stacked(each: Sequence[State]) -> State:
    """Trees of one form with a leading dimension for clients."""
    return map_tree(lambda *tensors: torch.stack(tensors), *each)


def _at(stack: State, k: int) -> State:
    return map_tree(lambda t: t[k], stack)


def _own(tree: State) -> State:
    """In memory of its own, so that nobody keeps the stack alive."""
    return map_tree(torch.clone, tree)
