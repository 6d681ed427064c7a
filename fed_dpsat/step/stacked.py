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
views of each example, or persons              ``Unstackable``
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

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.func import grad, vmap
from torch.nn import functional

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.errors import InputError
from fed_dpsat.params import Params, flatten, map_tree
from fed_dpsat.step.clipping import AdaptiveClipping, ClippingRule
from fed_dpsat.step.clipping.bound import Held, bounded_factors
from fed_dpsat.step.draws import Draws
from fed_dpsat.step.examples import Examples
from fed_dpsat.step.generators import Mark, borrowed, others_moved
from fed_dpsat.step.gradients import loop
from fed_dpsat.step.gradients.contribution import Unplanned
from fed_dpsat.step.gradients.finite import squared_norm_rows
from fed_dpsat.step.gradients.loss import check_types
from fed_dpsat.step.gradients.passes import InPass, check_backward, name_of
from fed_dpsat.step.gradients.skipped import ask_no_batch
from fed_dpsat.step.gradients.state import afresh
from fed_dpsat.step.loop import Batches, LocalResult, Member, Rows, Streams, Turn, check_rows
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.noise import Purpose, keyed_normals, keyed_words, uniforms
from fed_dpsat.step.optimizers.base import PrivateOptimizer, State, StepInfo
from fed_dpsat.step.query import At, LossFn, Query, simplified
from fed_dpsat.step.sampling import PoissonSampler
from fed_dpsat.step.secure_noise import SystemGenerator, add_noise_on_grid, system_generator

MOST_CLIENTS = 128
"""Of 8, 32 and 128 clients, 128 took the least time for an MLP, and 32 about as much for a CNN; more were not tried."""
HELD_NUMBERS = 1 << 24
"""Of the per-example gradients of a pass: 64 MB in float32."""
LARGEST_MODEL = 1 << 16
"""Parameters; larger models were not measured in stacks, and each has the engine for its layers alone."""


def automatic_sizes(parameters: int, clients: int) -> tuple[int, int]:
    """The clients of a stack, a power of 2, and the per-example gradients of a pass.

    They depend on the number of ``parameters`` of the model and of ``clients`` in a round alone, so that a seed has the
    same bits on each machine, for any number of workers. A model that is too large has one client, and no gradients.
    """
    if not 0 < parameters <= LARGEST_MODEL:
        return 1, 0
    return int(min(MOST_CLIENTS, 2 ** math.ceil(math.log2(max(clients, 1))))), HELD_NUMBERS // parameters


class Unstackable(Exception):
    """Something that clients cannot be trained together with; the message says what, and nothing was released."""


def alike(member: Member) -> Hashable:
    """Equal for members that can be stacked: one round and step, and states of one form."""
    return _form(member.state), member.first_step, member.streams.round


def _form(state: State) -> Hashable:
    return tuple(
        [(name, _form(part) if isinstance(part, dict) else (part.shape, part.dtype)) for name, part in state.items()]
    )


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
        local_steps: int,
        device: torch.device,
        engine: str,
        physical_batch_size: int,
        watched: bool,
    ) -> None:
        if isinstance(clipping, AdaptiveClipping):
            raise Unstackable("adaptive clipping, whose bound is another one for each client")
        if any(member.views or member.persons for member in members):
            raise Unstackable("views of each example, or persons, whose rows are bounded together")
        if len({alike(member) for member in members}) != 1:
            raise Unstackable("clients in different rounds, or with states of different forms")
        if len({(member.mechanism.clip_norm, member.mechanism.norm) for member in members}) != 1:
            raise Unstackable("mechanisms of different bounds")
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
        self.rounds = StackedRounds(members, clipping, local_steps)
        self._examples = _Common.of(members)

    def batch(self, step: int, drawn: Drawn) -> Batch:
        """The batches of all members, padded to the largest."""
        mark = Mark.here(self._device)
        if self._examples:
            batches = [(self._examples.batch(drawn), drawn.places)]
        else:
            each = torch.split(drawn.places, drawn.counts.tolist())
            if any(len(member.groups(places)) > 1 for member, places in zip(self._members, each, strict=True)):
                raise Unstackable("examples of different shapes")
            batches = [(member.batches(places), places) for member, places in zip(self._members, each, strict=True)]
        if mark.moved():
            raise Unstackable("batches that draw random numbers")
        for batch, places in batches:
            if not isinstance(batch[0], Tensor):
                raise Unstackable("examples of several arrays, whose sizes may differ between clients")
            check_rows(batch, places)
        real = (torch.arange(int(drawn.counts.max())) < drawn.counts[:, None]).to(self._device)
        inputs, targets = (
            _padded(torch.cat(parts), real) for parts in zip(*(made for made, _ in batches), strict=True)
        )
        return inputs, targets, real

    def query_point(self, info: StepInfo) -> Params:
        """A stack of points."""
        return self._optimizer.query_point(self._stack, self._state, info)

    def clipped_sum(self, at: At, batch: Batch) -> tuple[Params, Tensor]:
        """As ``stacked_sum``."""
        return stacked_sum(self._loss_fn, _point(at), *batch, self._clipping, self._size)

    def update(self, private_gradient: Params, info: StepInfo) -> None:
        """The step of all."""
        self._stack, self._state = self._optimizer.update(self._stack, private_gradient, self._state, info)
        if others_moved():
            raise Unstackable("an optimizer that draws from random or numpy.random")

    def of_each(self, private_gradient: Params) -> list[Params]:
        """The rows."""
        return [_at(private_gradient, k) for k in range(len(self._members))]

    def results(self) -> StackedResults:
        """The results of all."""
        return StackedResults(
            params=self._stack, state=self._state, events=self.rounds.events(), nonfinite=self.rounds.nonfinite()
        )


Batch = tuple[Tensor, Tensor, Tensor]
"""``inputs[K, B, ...]``, ``targets[K, B, ...]``, and which of them are there, ``real[K, B]``."""


@dataclass(frozen=True, kw_only=True)
class StackedResults(Sequence[LocalResult]):
    """The results of K members: ``params[K, ...]``, ``state[K, ...]``, and what is of each; a member's are copies."""

    params: Params
    state: State
    events: Sequence[PrivacyEvent]
    nonfinite: Sequence[int]

    def __len__(self) -> int:
        return len(self.events)

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        return LocalResult(
            params=_own(_at(self.params, k)),
            state=_own(_at(self.state, k)),
            event=self.events[k],
            nonfinite_examples=self.nonfinite[k],
        )


class Drawn(NamedTuple):
    """The examples of a step: ``places`` among those of each member, end to end, and the ``counts[K]``."""

    places: Tensor
    counts: Tensor

    @classmethod
    def of(cls, each: Sequence[Tensor]) -> Drawn:
        """Those of each member."""
        return cls(torch.cat(list(each)), torch.tensor([len(places) for places in each]))


class StackedRounds:
    """The coins and noise of all members, from the streams of each, drawn in one go.

    Noise from the operating system has one generator for all: its draws are independent. Members whose mechanism,
    sampler or streams are of a class of their own draw one by one, as alone.
    """

    def __init__(self, members: Sequence[Member], clipping: ClippingRule, local_steps: int) -> None:
        self._members, self._steps, self._step = members, local_steps, 0
        self._nonfinite = torch.zeros(len(members), dtype=torch.int64)
        mechanisms = [member.mechanism for member in members]
        self._scales = [m.noise_multiplier * m.clip_norm if m.noise_multiplier else 0.0 for m in mechanisms]  # 0 * inf
        self._stds = torch.tensor([m.noise_std for m in mechanisms], dtype=torch.float64)
        self._expected = torch.tensor([m.expected_batch_size for m in mechanisms], dtype=torch.float64)
        self._each: list[Turn] = []
        known = {(type(m.mechanism), type(m.sampler), type(m.streams)) for m in members}
        sources = {member.streams.noise_source for member in members}
        noised = {bool(scale) for scale in self._scales}
        self._generator = None
        if known != {(GaussianMechanism, PoissonSampler, Streams)} or len(sources) > 1 or len(noised) > 1:
            self._each = [Turn(member, clipping, local_steps) for member in members]
        elif sources == {"system"}:
            self._generator = system_generator()
        else:
            self._coins, self._noise = ([m.streams.key(purpose) for m in members] for purpose in SECRETS)

    def begin(self, step: int) -> StepInfo:
        """What optimizers are told, with a ``noise_std[K]``."""
        self._step = step
        if self._each:
            infos = [turn.begin(step) for turn in self._each]
            return replace(infos[0], noise_std=torch.stack([info.noise_std for info in infos]))
        first = self._members[0]
        return StepInfo(index=first.first_step + step, noise_std=self._stds, round=first.streams.round)

    def drawn(self) -> Drawn:
        """The examples of each."""
        if self._each:
            return Drawn.of([turn.drawn() for turn in self._each])
        if self._generator:
            return Drawn.of([member.sampler.sample(self._generator) for member in self._members])
        sizes = [member.sampler.num_examples for member in self._members]
        rates = [member.sampler.sample_rate for member in self._members]
        if len({*sizes}) == 1:
            words = keyed_words(self._coins, self._step * sizes[0], sizes[0])
            heads = uniforms(words) < np.array(rates)[:, None]
            clients, places = np.nonzero(heads)
            return Drawn(torch.from_numpy(places), torch.from_numpy(np.bincount(clients, minlength=len(sizes))))
        ones = zip(self._coins, sizes, rates, strict=True)
        coins = [uniforms(keyed_words([key], self._step * size, size)[0]) < rate for key, size, rate in ones]
        return Drawn.of([torch.from_numpy(np.flatnonzero(heads)) for heads in coins])

    def release(self, clipped_sum: Params, nonfinite: Tensor) -> Params:
        """The private gradients."""
        self._nonfinite += nonfinite.cpu()
        if self._each:
            rows = [_at(clipped_sum, k) for k in range(len(self._members))]
            return _stacked([turn.release(row, 0) for turn, row in zip(self._each, rows, strict=True)])
        noisy = self._noisy(clipped_sum) if any(self._scales) else clipped_sum
        return {name: total / _wide(self._expected, total) for name, total in noisy.items()}

    def end(self) -> None:
        """No bound changes: adaptive clipping is not stackable."""

    def events(self) -> list[PrivacyEvent]:
        """What the round of each cost; equal events are one object."""
        made: dict[tuple[float, float], PrivacyEvent] = {}
        events = []
        for member in self._members:
            rate, mechanism = member.sampler.sample_rate, member.mechanism
            event = made.get((mechanism.noise_multiplier, rate))
            if event is None or self._each:
                event = made[mechanism.noise_multiplier, rate] = mechanism.event(sample_rate=rate, steps=self._steps)
            events.append(event)
        return events

    def nonfinite(self) -> list[int]:
        """How many examples of each had no finite gradient."""
        found: list[int] = self._nonfinite.tolist()
        return found

    def _noisy(self, clipped_sum: Params) -> Params:
        if isinstance(self._generator, SystemGenerator):
            return self._on_grid(clipped_sum, self._generator)
        sizes = [total[0].numel() for total in clipped_sum.values()]
        normals = keyed_normals(self._noise, self._step, sum(sizes)) * torch.tensor(self._scales)[:, None]
        drawn = zip(clipped_sum.items(), torch.split(normals, sizes, dim=1), strict=True)
        return {name: total + part.reshape(total.shape).to(total) for (name, total), part in drawn}

    def _on_grid(self, clipped_sum: Params, generator: SystemGenerator) -> Params:
        mechanisms = [member.mechanism for member in self._members]
        how: dict[str, Any] = {"clip_norm": mechanisms[0].clip_norm, "generator": generator}
        multipliers = [mechanism.noise_multiplier for mechanism in mechanisms]
        if len({*multipliers}) == 1:
            return add_noise_on_grid(clipped_sum, noise_multiplier=multipliers[0], clients=len(mechanisms), **how)
        rows = [_at(clipped_sum, k) for k in range(len(mechanisms))]
        pairs = zip(rows, multipliers, strict=True)
        return _stacked([add_noise_on_grid(row, noise_multiplier=multiplier, **how) for row, multiplier in pairs])


SECRETS: tuple[Purpose, Purpose] = ("sampling", "noise")


@dataclass(frozen=True)
class _Common:
    """The examples of members of one data set: ``indices`` of all, end to end, and where each begins, ``[K]``."""

    batches: Batches
    indices: Tensor
    starts: Tensor

    @classmethod
    def of(cls, members: Sequence[Member]) -> _Common | None:
        """None for members that make their batches in another way."""
        rows = [member.batches for member in members if isinstance(member.batches, Rows)]
        if len(rows) < len(members) or any(one.common is not rows[0].common for one in rows):
            return None
        sizes = torch.tensor([len(one.indices) for one in rows])
        return cls(rows[0].common, torch.cat([one.indices for one in rows]), sizes.cumsum(0) - sizes)

    def batch(self, drawn: Drawn) -> tuple[Examples, Tensor]:
        """The examples of all, end to end."""
        return self.batches(self.indices[drawn.places + self.starts.repeat_interleave(drawn.counts)])


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
        if func is functional.embedding:
            _check_words(*args[:2], **kwargs)
        elif name_of(func).partition(".")[0] == "embedding":
            raise Unplanned("an embedding that is not torch.nn.functional's")
        return func(*args, **kwargs)


def _check_words(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> None:
    """Raise ``IndexError`` as torch does alone; ``vmap`` takes a word beyond a table from that of the next client."""
    words = input
    while functorch.is_functorch_wrapped_tensor(words):
        words = functorch.get_unwrapped(words)
    if words.numel() and not 0 <= int(words.min()) <= int(words.max()) < weight.shape[0]:
        raise IndexError("index out of range in self")


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
        self._members, self._states = members, dict[int, Tensor]()

    @contextmanager
    def of(self, k: int) -> Iterator[None]:
        if k in self._states:
            torch.set_rng_state(self._states[k])
        else:
            torch.default_generator.manual_seed(self._members[k].streams.torch_seed())
        yield
        self._states[k] = torch.get_rng_state()


class _Optimizer:
    """Both functions of ``optimizer`` on stacks: mapped over clients, or client by client if it cannot be."""

    def __init__(self, optimizer: PrivateOptimizer, draws: _Draws) -> None:
        self._optimizer, self._draws, self._maps = optimizer, draws, True

    def query_point(self, params: Params, state: State, info: StepInfo) -> Params:
        if self._maps:
            before = _versions(params, state)
            try:
                return vmap(lambda p, s, std: _point(self._optimizer.query_point(p, s, replace(info, noise_std=std))))(
                    params, state, info.noise_std
                )
            except Unstackable:
                raise
            except Exception:  # whatever it is, it is raised again where it does not come of the mapping
                self._one_by_one(before, params, state)
        return _stacked([self._asked(k, params, state, one) for k, one in enumerate(_infos(info))])

    def update(self, params: Params, private_gradient: Params, state: State, info: StepInfo) -> tuple[Params, State]:
        if self._maps:
            before = _versions(params, private_gradient, state)
            try:
                moved, after = vmap(lambda p, g, s, std: self._optimizer.update(p, g, s, replace(info, noise_std=std)))(
                    params, private_gradient, state, info.noise_std
                )
                return moved, after
            except Exception:
                self._one_by_one(before, params, private_gradient, state)
        each = [self._moved(k, params, private_gradient, state, one) for k, one in enumerate(_infos(info))]
        if len({_form(after) for _, after in each}) != 1:
            raise Unstackable("an optimizer that leaves states of different forms")
        return _stacked([moved for moved, _ in each]), _stacked([after for _, after in each])

    def _one_by_one(self, before: int, *trees: State) -> None:
        """From now on; ``trees`` had the versions ``before``, and half a step in them would be done again."""
        self._maps = False
        if _versions(*trees) != before:
            raise Unstackable("an optimizer that writes into what it is given, and that vmap refuses")

    def _asked(self, k: int, params: Params, state: State, info: StepInfo) -> Params:
        with self._draws.of(k):
            return _point(self._optimizer.query_point(_own(_at(params, k)), _own(_at(state, k)), info))

    def _moved(
        self, k: int, params: Params, private_gradient: Params, state: State, info: StepInfo
    ) -> tuple[Params, State]:
        with self._draws.of(k):
            own = [_own(_at(tree, k)) for tree in (params, private_gradient, state)]  # a view leads to all members
            return self._optimizer.update(own[0], own[1], own[2], info)


def _versions(*trees: State) -> int:
    """Another number after a tensor of ``trees`` was written into."""
    return sum(t._version for tree in trees for t in flatten(tree).values())


def _infos(info: StepInfo) -> list[StepInfo]:
    """That of each client, which differs in its noise."""
    return [replace(info, noise_std=std) for std in info.noise_std]


def _point(at: At) -> Params:
    at = simplified(at)
    if isinstance(at, Query):
        raise Unstackable("an optimizer that asks for more than one plain gradient")
    return at


def _padded(rows: Tensor, real: Tensor) -> Tensor:
    """``rows`` of all clients, end to end, at the places that are ``real[K, B]``, and zeros elsewhere."""
    padded = rows.new_zeros((*real.shape, *rows.shape[1:]))
    padded[real] = rows
    return padded


def _wide(numbers: Tensor, like: Tensor) -> Tensor:
    """``[K]`` as ``[K, 1, ...]``, to calculate with ``like[K, ...]``."""
    return numbers.to(like).view(-1, *[1] * (like.ndim - 1))


def _stacked(each: Sequence[State]) -> State:
    """Trees of one form with a leading dimension for clients."""
    return map_tree(lambda *tensors: torch.stack(tensors), *each)


def _at(stack: State, k: int) -> State:
    return map_tree(lambda t: t[k], stack)


def _own(tree: State) -> State:
    """In memory of its own, so that nobody keeps the stack alive."""
    return map_tree(torch.clone, tree)
