"""The one training loop: a client's round, read like the algorithm box of the papers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params
from fed_dpsat.step.bundles import Bundles, Part
from fed_dpsat.step.clipping import AdaptiveClipping, ClippingRule, Tally, check_clip_norm
from fed_dpsat.step.clipping.bound import Held, bounds_l1
from fed_dpsat.step.draws import Draws, fresh_key, step_key
from fed_dpsat.step.examples import Examples, count, joined
from fed_dpsat.step.generators import Mark, kept, seed, training_on
from fed_dpsat.step.gradients.ordinary import Ordinary
from fed_dpsat.step.gradients.per_example import LossFn, clipped_gradient_sum
from fed_dpsat.step.gradients.plain import unbounded
from fed_dpsat.step.mechanism import MECHANISMS, GaussianMechanism, LaplaceMechanism, Mechanism
from fed_dpsat.step.modes import in_mode
from fed_dpsat.step.noise import NOISE_SOURCES, SECRET, Purpose, derive_generator, derive_key, derive_seed
from fed_dpsat.step.optimizers.base import PrivateOptimizer, State, StepInfo, Update, owned_update
from fed_dpsat.step.persons import Persons
from fed_dpsat.step.placement import device_of
from fed_dpsat.step.query import At, Query, check_loss, spread
from fed_dpsat.step.sampling import PoissonSampler
from fed_dpsat.step.secure_noise import system_generator
from fed_dpsat.step.unchecked import checking
from fed_dpsat.step.views import Views

Batches = Callable[[Tensor], tuple[Examples, Tensor]]
"""Indices ``[B]`` to ``(inputs[B, ...], targets[B])``."""
Groups = Callable[[Tensor], Sequence[Tensor]]
"""Indices ``[B]`` to the places of examples that can be in one batch, group by group; each place once."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The ``Batches`` of a client that has the examples ``indices[N]`` of a data set; ``common`` makes those of all."""

    common: Batches
    indices: Tensor

    def __call__(self, places: Tensor) -> tuple[Examples, Tensor]:
        """The examples at ``places[B]`` of ``indices``."""
        return self.common(self.indices[places])


def one_group(indices: Tensor) -> list[Tensor]:
    """All in one batch: examples of one shape."""
    return [torch.arange(len(indices))]


@dataclass(frozen=True, kw_only=True)
class Streams:
    """Whose randomness this is: the generators of one client's attempt at one round.

    With ``noise_source`` "system", batches and noise have generators that no seed, call or process repeats, and so have
    the draws of examples inside a model.
    """

    seed: int
    client: int
    round: int
    attempt: int = 0
    noise_source: str = "seeded"

    def __post_init__(self) -> None:
        if self.noise_source not in NOISE_SOURCES:
            raise SettingError(
                "noise_source", self.noise_source, f"one of {', '.join(NOISE_SOURCES)}", "choose one of those"
            )

    def generator(self, purpose: Purpose) -> np.random.Generator:
        """A fresh generator at the start of its stream."""
        if self.noise_source == "system" and purpose in SECRET:
            return system_generator()
        return derive_generator(self.seed, purpose=purpose, client=self.client, round=self.round, attempt=self.attempt)

    def key(self, purpose: Purpose) -> bytes:
        """The key of the generator of a seeded ``purpose``."""
        return derive_key(self.seed, purpose=purpose, client=self.client, round=self.round, attempt=self.attempt)

    def draws(self, step: int, indices: Tensor) -> Draws:
        """What the examples ``indices[B]`` of the client draw inside a model, in a step of the round, from 0."""
        key = fresh_key() if self.noise_source == "system" and "draws" in SECRET else self.key("draws")
        return Draws(key=step_key(key, step), ids=indices.cpu().numpy())

    def torch_seed(self) -> int:
        """A seed for what an optimizer draws from torch itself, such as public directions."""
        return derive_seed(self.seed, purpose="model", client=self.client, round=self.round, attempt=self.attempt)


@dataclass(frozen=True, kw_only=True)
class LocalResult:
    """What a client's round made. ``params``, ``records`` and ``event`` may leave; ``nonfinite_examples`` is sensitive.

    ``records`` are what the client's half of a strategy adds to a reply. ``clip_norm`` is where adaptive clipping
    stands; None for a rule of one bound.
    """

    params: Params
    state: State
    event: PrivacyEvent
    nonfinite_examples: int
    clip_norm: float | None = None
    records: Mapping[str, Params] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Member:
    """What is a client's own of a round; ``own`` are parameters of its own in place of the common ones.

    ``groups`` divides a batch, so that no example has a shape that follows from others (``Examples.alike``).
    ``first_step`` is the index of the first step among those of the federation, ``clip_norm`` where adaptive clipping
    begins, by default at its first bound. ``views`` are made of each example, and their mean gradient is bounded. With
    ``persons`` the sampler draws those, and what is bounded is the gradient of a person.
    """

    batches: Batches
    state: State
    sampler: PoissonSampler
    mechanism: Mechanism
    streams: Streams
    first_step: int = 0
    clip_norm: float | None = None
    own: Params = field(default_factory=dict)
    groups: Groups = one_group
    views: Views | None = None
    persons: Persons | None = None


Watch = Callable[[int, At, Params], None]
"""Who is shown the private gradient of each member's step, by its place, and the query that it answers."""


class Rounds(Protocol):
    """The coins and the noise of the members that an executor trains."""

    def begin(self, step: int) -> StepInfo:
        """The bound and the noise of ``step``, and what the optimizer is told of it."""

    def drawn(self) -> Any:
        """The examples of this step."""

    def release(self, clipped_sum: Params, nonfinite: Any) -> Params:
        """The private gradient."""

    def end(self) -> None:
        """The bound of the next step."""


class Executor(Protocol):
    """How the members of ``train`` compute: one, or several whose tensors have a leading dimension for them."""

    @property
    def rounds(self) -> Rounds:
        """Their coins and noise; all else that a step takes is here."""

    def batch(self, step: int, drawn: Any) -> Any:
        """The examples that are ``drawn``."""

    def query_point(self, info: StepInfo) -> At:
        """Where the gradients of this step are taken."""

    def clipped_sum(self, at: At, batch: Any) -> tuple[Params, Any]:
        """The clipped sum, and how many examples were not finite."""

    def update(self, private_gradient: Params, info: StepInfo) -> None:
        """The step."""

    def of_each(self, private_gradient: Params) -> Iterable[Params]:
        """The private gradient of each member."""

    def results(self) -> Sequence[LocalResult]:
        """What the round of each member made."""


def train(
    params: Params,
    members: Sequence[Member],
    *,
    loss_fn: LossFn,
    optimizer: PrivateOptimizer,
    clipping: ClippingRule,
    local_steps: int,
    executor: Callable[..., Executor] | None = None,
    engine: str = "auto",
    physical_batch_size: int = 128,
    watch: Watch | None = None,
) -> Sequence[LocalResult]:
    """``local_steps`` private steps of each of ``members`` from ``params``, each an event of the member's mechanism.

    Members train one after the other with ``engine``, or as the ``executor`` does it (``stacked.Stacked``). All is
    computed where ``params`` are. The data is touched through ``Member.batches`` alone, and only the clipped sum is
    made of it; row i of a batch has to be made of example i alone, which nothing here can see. An empty batch is a
    step like any other. Raises ``SettingError`` for what could cost more than the event says: a mechanism whose noise
    is scaled to another bound than ``clipping`` has, factors that do not keep it, batches with more rows than examples,
    and a mechanism, sampler or streams of another class than those named here (but within ``unchecked``).
    """
    for member in members:
        check_known(member.mechanism, member.sampler, member.streams, member.views, member.persons)
        check_persons(member)
        check_bound(member.mechanism, clipping)
    settings: dict[str, Any] = {
        "loss_fn": loss_fn,
        "optimizer": optimizer,
        "clipping": clipping,
        "local_steps": local_steps,
        "engine": engine,
        "physical_batch_size": physical_batch_size,
    }
    if executor is not None:
        return _trained(params, members, executor, watch, **settings)
    return [
        result
        for k, member in enumerate(members)
        for result in _trained(params, [member], Alone, watch and _moved_on(watch, k), **settings)
    ]


def _moved_on(watch: Watch, k: int) -> Watch:
    return lambda _, at, private_gradient: watch(k, at, private_gradient)


def _trained(
    params: Params,
    members: Sequence[Member],
    executor: Callable[..., Executor],
    watch: Watch | None,
    *,
    loss_fn: LossFn,
    local_steps: int,
    **settings: Any,
) -> Sequence[LocalResult]:
    device = device_of(params)
    with training_on(device), in_mode(module_of(loss_fn), training=True):
        run = executor(
            params,
            members,
            loss_fn=loss_fn,
            local_steps=local_steps,
            device=device,
            watched=watch is not None,
            **settings,
        )
        rounds = run.rounds
        for step in range(local_steps):
            info = rounds.begin(step)
            batch = run.batch(step, rounds.drawn())
            at = run.query_point(info)
            check_loss(at.loss if isinstance(at, Query) else None)
            clipped_sum, nonfinite = run.clipped_sum(at, batch)
            private = spread(at, rounds.release(clipped_sum, nonfinite))
            for k, gradient in enumerate(run.of_each(private) if watch else ()):
                watch(k, at, gradient)  # type: ignore[misc]
            del at, batch, clipped_sum  # or the next pass over a batch holds three models more
            run.update(private, info)
            del private
            rounds.end()
    return run.results()


class Turn:
    """A member's round: its coins and noise, and what bounds and noises its step."""

    def __init__(self, member: Member, clipping: ClippingRule, local_steps: int) -> None:
        self._member, self._steps, self._nonfinite = member, local_steps, 0
        self._adaptive = clipping if isinstance(clipping, AdaptiveClipping) else None
        self._bound = member.mechanism.clip_norm if member.clip_norm is None else member.clip_norm
        self._coins = member.sampler.batches(local_steps, member.streams.generator("sampling"))
        self._noise = member.streams.generator("noise")
        self.rule: ClippingRule = clipping
        if not unbounded(clipping):
            self.rule = Held(rule=clipping, clip_norm=member.mechanism.clip_norm, norm=member.mechanism.norm)
        self.of_gradient = self._of_count = member.mechanism

    def begin(self, step: int) -> StepInfo:
        """The bound and the noise of ``step``, and what the optimizer is told of it."""
        member = self._member
        self.of_gradient = member.mechanism
        if self._adaptive:
            self.rule = Tally(clip_norm=self._bound)
            self.of_gradient, self._of_count = _joint(self._adaptive, member.mechanism, self._bound)
        return step_info(member.first_step + step, self.of_gradient, member.streams)

    def drawn(self) -> Tensor:
        """The indices ``[B]`` of this step."""
        return next(self._coins)

    def release(self, clipped_sum: Params, nonfinite: int) -> Params:
        """The private gradient."""
        self._nonfinite += nonfinite
        return self.of_gradient.privatize(clipped_sum, self._noise)

    def end(self) -> None:
        """The bound of the next step."""
        if self._adaptive and isinstance(self.rule, Tally):
            below = self._of_count.privatize({"below": torch.tensor(self.rule.centred)}, self._noise)["below"]
            self._bound = check_clip_norm(self._adaptive.next_clip_norm(self._bound, float(below) + 0.5))

    def result(self, params: Params, state: State) -> LocalResult:
        """What the round made."""
        member = self._member
        return LocalResult(
            params=params,
            state=state,
            event=member.mechanism.event(
                sample_rate=member.sampler.sample_rate, steps=self._steps, unit="user" if member.persons else "example"
            ),
            nonfinite_examples=self._nonfinite,
            clip_norm=self._bound if self._adaptive else None,
        )


class Alone:
    """One member, by an engine for per-example gradients; the seed is that of its streams."""

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
        (self._member,) = members
        self.rounds = Turn(self._member, clipping, local_steps)
        self._params, self._state = params, self._member.state
        self._loss_fn, self._device = loss_fn, device
        self._query_point = optimizer.query_point
        self._update: Update = optimizer.update
        mechanism = self._member.mechanism
        if type(mechanism) in MECHANISMS.values() and not watched:  # else somebody may keep what was released
            self._update = owned_update(optimizer)
        self._ordinary = Ordinary.of(loss_fn, clipping, mechanism)
        self._how: dict[str, Any] = {"engine": engine, "physical_batch_size": physical_batch_size}
        seed(device, self._member.streams.torch_seed())

    def batch(self, step: int, drawn: Tensor) -> list[Part]:
        """As ``made_batch``, group by group."""
        member = self._member
        draws = partial(member.streams.draws, step)
        if member.persons:
            return [
                Part(made_batch(member.batches, some, mine, self._device), mine, bundles)
                for places, of_all in member.persons.chosen(drawn, draws)
                for some, bundles in bundles_alike(member.groups, places, of_all)
                for mine in [draws(some)]
            ]
        of_batch = draws(drawn)
        return [
            Part(made_batch(member.batches, drawn[places], mine, self._device), mine)
            for places in checked_groups(member.groups(drawn), len(drawn))
            for mine in [of_batch.some(places.numpy())]
        ]

    def query_point(self, info: StepInfo) -> At:
        """What the optimizer asks."""
        return self._query_point(self._params, self._state, info)

    def clipped_sum(self, at: At, batch: list[Part]) -> tuple[Params, int]:
        """The sum of ``clipped_gradient_sum`` over the groups."""
        loss = self._loss_fn
        if self._ordinary:
            loss, self.rounds.of_gradient = self._ordinary.pair(at)
        total: Params = {}
        nonfinite = 0
        for part in self._shown(batch):
            found, skipped = clipped_gradient_sum(
                loss, at, part.batch, self.rounds.rule, draws=part.draws, bundles=part.bundles, **self._how
            )
            total = {name: before + found[name] for name, before in total.items()} or found
            nonfinite += skipped
        return total, nonfinite

    def _shown(self, batch: list[Part]) -> Iterator[Part]:
        """``batch``, or the views of it, a few examples at a time."""
        views = self._member.views
        for part in batch:
            yield from views.parts(part, self._how["physical_batch_size"]) if views else [part]

    def update(self, private_gradient: Params, info: StepInfo) -> None:
        """What the optimizer makes of it."""
        self._params, self._state = self._update(self._params, private_gradient, self._state, info)

    def of_each(self, private_gradient: Params) -> list[Params]:
        """Its own."""
        return [private_gradient]

    def results(self) -> list[LocalResult]:
        """What there is."""
        return [self.rounds.result(self._params, self._state)]


def train_locally(
    params: Params,
    batches: Batches,
    *,
    loss_fn: LossFn,
    optimizer: PrivateOptimizer,
    clipping: ClippingRule,
    local_steps: int,
    engine: str = "auto",
    physical_batch_size: int = 128,
    **of_member: Any,
) -> LocalResult:
    """``train`` of one member; ``of_member`` are the other fields of a ``Member``."""
    (result,) = train(
        params,
        [Member(batches=batches, **of_member)],
        loss_fn=loss_fn,
        optimizer=optimizer,
        clipping=clipping,
        local_steps=local_steps,
        engine=engine,
        physical_batch_size=physical_batch_size,
    )
    return result


def step_info(index: int, mechanism: Mechanism, streams: Streams) -> StepInfo:
    """What an optimizer is told of a step whose private gradient is that of ``mechanism``."""
    std = torch.tensor(mechanism.noise_std, dtype=torch.float64)
    return StepInfo(index=index, noise_std=std, round=streams.round)


def _joint(
    adaptive: AdaptiveClipping, mechanism: Mechanism, clip_norm: float
) -> tuple[GaussianMechanism, GaussianMechanism]:
    """The mechanisms of gradient and count, which together cost the event of ``mechanism``."""
    batch_size = mechanism.expected_batch_size
    gradient, count = adaptive.noise_multipliers(mechanism.noise_multiplier, batch_size)
    if checking() and not _cost(gradient) + _cost(count) <= _cost(mechanism.noise_multiplier) * (1 + 1e-9):
        raise SettingError(
            "clipping",
            type(adaptive).__name__,
            f"one whose gradient and count cost noise_multiplier={mechanism.noise_multiplier:g} together",
            "give noise_multipliers with z_gradient^-2 + z_count^-2 <= noise_multiplier^-2",
        )
    return (
        GaussianMechanism(noise_multiplier=gradient, clip_norm=clip_norm, expected_batch_size=batch_size),
        GaussianMechanism(noise_multiplier=count, clip_norm=0.5, expected_batch_size=batch_size),
    )


def _cost(noise_multiplier: float) -> float:
    return noise_multiplier**-2 if noise_multiplier else math.inf


def check_known(
    mechanism: Mechanism,
    sampler: PoissonSampler,
    streams: Streams,
    views: Views | None = None,
    persons: Persons | None = None,
) -> None:
    """Raise ``SettingError`` for a class that may add, draw or repeat something else than the event says."""
    known: tuple[type, ...]
    for name, part, known in (
        ("mechanism", mechanism, tuple(MECHANISMS.values())),
        ("sampler", sampler, (PoissonSampler,)),
        ("streams", streams, (Streams,)),
        ("views", views, (Views, type(None))),
        ("persons", persons, (Persons, type(None))),
    ):
        if type(part) not in known and checking():
            raise SettingError(
                name,
                type(part).__name__,
                f"a {' or a '.join(c.__name__ for c in known)} itself, of which is known that it does what is charged",
                "pass one, or vouch for yours: `with fed_dpsat.step.unchecked.unchecked():`",
            )


def check_persons(member: Member) -> None:
    """Raise ``SettingError`` for a sampler that does not toss one coin for each of the member's persons."""
    if member.persons and member.sampler.num_examples != len(member.persons) and checking():
        raise SettingError(
            "sampler.num_examples",
            member.sampler.num_examples,
            f"{len(member.persons)}, one coin for each person",
            "make the sampler of that many",
        )


def check_bound(mechanism: Mechanism, clipping: ClippingRule) -> None:
    """Raise ``SettingError`` if noise is scaled to another bound than examples keep."""
    declared = check_clip_norm(clipping.clip_norm)
    if mechanism.clip_norm != declared:
        raise SettingError(
            "mechanism.clip_norm",
            mechanism.clip_norm,
            f"that of the clipping rule, {declared}",
            "noise is scaled to what clipping bounds; give both the same",
        )
    if isinstance(mechanism, LaplaceMechanism) and not bounds_l1(clipping):
        raise SettingError(
            "clipping", type(clipping).__name__, "a bound of the L1 norm, to which Laplace noise is scaled", "use l1"
        )


def module_of(loss_fn: LossFn) -> object:
    """The module of a ``ModelLoss``, which a loop puts into training mode."""
    return getattr(loss_fn, "module", None)


def made_batch(batches: Batches, indices: Tensor, draws: Draws, device: torch.device) -> tuple[Examples, Tensor]:
    """``batches(indices)``; example by example, each with generators seeded by ``draws``, if it draws from them.

    Raises ``SettingError`` as ``check_rows``.
    """
    mark = Mark.here(device)
    batch = batches(indices)
    if mark.moved() and len(indices):
        each = []
        with kept(device):
            for i, value in enumerate(draws.seeds()):
                seed(device, value)
                each.append(batches(indices[i : i + 1]))
                check_rows(each[-1], indices[i : i + 1])
        inputs, targets = zip(*each, strict=True)
        batch = joined(list(inputs)), joined(list(targets))
    check_rows(batch, indices)
    return batch


def checked_groups(groups: Sequence[Tensor], count: int) -> Sequence[Tensor]:
    """``groups``; raises ``SettingError`` unless they have each of ``count`` places once."""
    if not torch.equal(torch.cat(list(groups)).sort().values, torch.arange(count)):
        raise SettingError("groups", [len(g) for g in groups], f"each of {count} examples once", "see Examples.alike")
    return groups


def bundles_alike(groups: Groups, places: Tensor, bundles: Bundles) -> Iterator[tuple[Tensor, Bundles]]:
    """``bundles`` of rows ``places[G * R]``, those together whose rows reach the same of ``groups``, which are ordered.

    The rows of a bundle have one shape, that of the last group among them: it follows from no other bundle.
    """
    group = torch.empty(len(places), dtype=torch.int64)
    for k, some in enumerate(checked_groups(groups(places), len(places))):
        group[some] = k
    reached = group.view(bundles.weights.shape).amax(1)
    for k in torch.unique(reached) if len(reached) else [0]:
        mine = reached == k
        yield places.view(bundles.weights.shape)[mine].flatten(), Bundles(bundles.weights[mine])


def check_rows(batch: tuple[Examples, Tensor], indices: Tensor) -> None:
    """Raise ``SettingError`` where a batch has more rows, or fewer, than examples were sampled."""
    if count(batch[1]) != len(indices):
        raise SettingError(
            "batches",
            count(batch[1]),
            f"{len(indices)} rows, one per sampled example",
            "views of one example belong into its loss, or are Member.views, so that clipping bounds them together",
        )
