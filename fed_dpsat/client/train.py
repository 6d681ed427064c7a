"""The round of a client: its data, state and noise as a member of the training loop, and its reply."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from fed_dpsat.accounting.event import DISTRIBUTIONS, PrivacyError, PrivacyEvent
from fed_dpsat.client import unit as client_level
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.attackers import Attackers
from fed_dpsat.client.half import HALF, ClientHalf, Received, Records
from fed_dpsat.client.half_round import AT, MODELS, OfHalf, fresh, steps_of_model
from fed_dpsat.client.personal import PERSONAL, only, without
from fed_dpsat.client.start import Start
from fed_dpsat.data.dataset import Dataset
from fed_dpsat.data.persons import persons_of
from fed_dpsat.errors import RunError, warn_once
from fed_dpsat.params import Params, flatten, laid_end_to_end, map_tree, subtract
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.averaging import LocalAverage
from fed_dpsat.step.clipping import AdaptiveClipping, ClippingRule, FlatClipping
from fed_dpsat.step.gradients.per_example import ModelLoss
from fed_dpsat.step.gradients.unchanging import unchanged
from fed_dpsat.step.loop import Batches, Executor, LocalResult, Member, Rows, Streams, Watch, train
from fed_dpsat.step.mechanism import MECHANISMS, Mechanism
from fed_dpsat.step.noise import derive_generator
from fed_dpsat.step.optimizers.base import PrivateOptimizer, State, next_round, subspace_of
from fed_dpsat.step.optimizers.proximal import Proximal
from fed_dpsat.step.persons import Persons
from fed_dpsat.step.placement import CPU, device_of, is_card, moved, moved_state
from fed_dpsat.step.sampling import PoissonSampler
from fed_dpsat.step.stacked import Stacked, StackedResults, Unstackable, alike, automatic_sizes
from fed_dpsat.step.subspace import Coordinates, Span
from fed_dpsat.step.views import Views
from fed_dpsat.tasks.base import Task

STACKING_ENGINES = ("auto", "vmap")


def with_stacks(config: RunConfig, clipping: ClippingRule, parameters: int) -> RunConfig:
    """``config`` with ``stack_clients`` for a model with so many ``parameters``, if it is automatic.

    It is 1 if clients cannot be stacked; else ``physical_batch_size`` rises to what a pass of a stack may hold.
    """
    if config.stack_clients:
        return config
    together = config.engine in STACKING_ENGINES and config.precision == "float32" and not config.secure_aggregation
    size, held = automatic_sizes(parameters, config.cohort_size)
    bundled = config.augmentations or config.privacy_unit == "user"
    if not together or isinstance(clipping, AdaptiveClipping) or bundled or size == 1:
        return dataclasses.replace(config, stack_clients=1)
    return dataclasses.replace(config, stack_clients=size, physical_batch_size=max(config.physical_batch_size, held))


REMEMBERED_SAMPLERS = 4096

OPTIMIZER, CLIPPING = "optimizer", "clipping"
"""The keys of a client's state for the optimizer and the bound of adaptive clipping; see ``PERSONAL`` too."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One client's round: the arguments of ``Experiment.client_round``."""

    client: int
    assignment: Assignment
    params: Params
    state: State | None
    proximal_mu: float = 0.0
    records: Records = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Training:
    """The objects that clients train with.

    The model is on the device of the computation; parameters and states come from the CPU and return to it.
    ``attackers`` train on their poisoned labels in ``dataset``, and forge their updates. ``personal`` names the
    parameters that stay on the client. ``held`` has the examples of each client that are for evaluation. ``half`` is
    the client's half of the strategy. ``watches`` see the private gradients of clients that train alone, in an audit.
    """

    config: RunConfig
    dataset: Dataset
    partitions: Sequence[np.ndarray]
    loss_fn: ModelLoss
    optimizer: PrivateOptimizer
    clipping: ClippingRule
    task: Task
    attackers: Attackers | None = None
    start: Start
    personal: frozenset[str] = frozenset()
    half: ClientHalf | None = None
    held: Sequence[np.ndarray] = ()
    watches: Mapping[int, Watch] = field(default_factory=dict)
    _persons: dict[int, Persons] = field(default_factory=dict, init=False, repr=False, compare=False)
    _samplers: dict[tuple[int, float, float], tuple[PoissonSampler, Mechanism]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @functools.cached_property
    def _batch(self) -> Batches:
        """One function for all clients."""
        return lambda indices: self.dataset.train.batch(indices, self.device)

    @functools.cached_property
    def device(self) -> torch.device:
        """The device of the model."""
        return device_of(self.loss_fn.module)

    def trained(self, round: int) -> Params:
        """The parameters that ``round`` trains, with their initial values."""
        return {name: p.detach().to(CPU, copy=True) for name, p in self._trained(round).items()}

    def _trained(self, round: int) -> dict[str, nn.Parameter]:
        later = self.start.later_names if 0 < self.config.unfreeze_round <= round else ()
        names = set(later or self.start.names)
        return {name: p for name, p in self.loss_fn.module.named_parameters() if name in names}

    def whole(self, shared: Params, state: State | None) -> Params:
        """A client's model: the ``shared`` part, and its own part from ``state`` or else the initial one."""
        if not self.personal:
            return shared
        # with personal layers, all rounds train the same parameters
        initial = moved(self.trained(1), device_of(shared))
        own = (state or {}).get(PERSONAL, only(initial, self.personal))
        return {name: own[name] if name in self.personal else shared[name] for name in initial}

    def own_model(self, shared: Params, state: State | None) -> Params:
        """The model that a client with ``state`` uses and is measured on; ``shared`` is the global one."""
        if self.half is None:
            return self.whole(shared, state)
        return fresh(self.half).own_model(shared, (state or {}).get(HALF, {}))

    @property
    def has_own_models(self) -> bool:
        """Whether clients use models of their own."""
        return bool(self.personal) or type(self.half or ClientHalf()).own_model is not ClientHalf.own_model

    @property
    def local_clipping(self) -> ClippingRule:
        """The clipping in local training: none if the unit is the client, whose whole change is clipped."""
        return self.clipping if self.config.privacy_unit != "client" else FlatClipping(clip_norm=math.inf)

    @functools.cached_property
    def sizes(self) -> list[int]:
        """How many examples each client has, or persons if those are the unit: what is declared public of it."""
        if self.person_of is None:
            return [len(part) for part in self.partitions]
        return [len(np.unique(self.person_of[part])) for part in self.partitions]

    @functools.cached_property
    def person_of(self) -> np.ndarray | None:
        """``[N]``, the number of the person of each training example, if persons are the unit."""
        config = self.config
        return persons_of(self.dataset.train, config.user_column) if config.privacy_unit == "user" else None

    def persons(self, client: int) -> Persons | None:
        """Those of ``client``, if persons are the unit."""
        if self.person_of is None:
            return None
        if client not in self._persons:
            users, config = self.person_of[self.partitions[client]], self.config
            self._persons[client] = Persons.of(users, most=config.user_examples, gradient=config.user_gradient)
        return self._persons[client]

    @functools.cached_property
    def views(self) -> Views | None:
        """The random views of each example that a step trains on."""
        config = self.config
        return Views(count=config.augmentations, augmentation=config.augmentation) if config.augmentations else None

    def subspace(self, round: int) -> Coordinates | Span | None:
        """The subspace of ``round`` (from 1), if the optimizer has one; None if replies are whole models.

        Replies are whole models under secure aggregation, whose masks need every coordinate, with personal layers and
        with the client's half of a strategy.
        """
        if self.config.secure_aggregation or self.personal or self.half:
            return None
        return subspace_of(self.optimizer, round, sum(p.numel() for p in self._trained(round).values()))

    def client_round(
        self,
        client: int,
        assignment: Assignment,
        params: Params,
        state: State | None,
        proximal_mu: float = 0.0,
        records: Records | None = None,
    ) -> LocalResult:
        """One round of ``client`` from the global ``params``; ``state`` is its state after its last round.

        ``proximal_mu`` is the weight of FedProx, ``records`` are those that the client's half receives. Raises
        ``SettingError`` for an assignment that no mechanism or sampler accepts, and ``PrivacyError`` for an assignment
        of another unit, or if the event that ran is not the assigned one.
        """
        request = Request(
            client=client,
            assignment=assignment,
            params=params,
            state=state,
            proximal_mu=proximal_mu,
            records=records or {},
        )
        result = self._alone(request)
        if self.attackers is None or client not in self.attackers.clients:
            return result
        forged = self.attackers.forged(
            client,
            subtract(result.params, params),
            lambda other: subtract(self._alone(dataclasses.replace(request, client=other, state=None)).params, params),
            num_clients=self.config.num_clients,
            generator=derive_generator(
                self.config.seed,
                purpose="attack",
                client=client,
                round=assignment.round,
                attempt=assignment.attempt,
            ),
        )
        return dataclasses.replace(result, params={name: params[name] + u for name, u in forged.items()})

    def client_rounds(self, requests: Sequence[Request]) -> list[LocalResult]:
        """The results of ``client_round`` to about 1e-6 relative; trains clients together if it can.

        Clients train together if they have equal ``local_steps``, the same ``params`` object and states of one form. An
        attacker trains alone. All train alone under an engine that was chosen by name, or with a loss, rule or
        optimizer that cannot be stacked; the log gives the reason once. Raises the errors of ``client_round``.
        """
        groups: dict[Hashable, list[int]] = {}
        placed = self._placed(requests)
        members = [self._member(request) for request in placed]
        for i, (request, member) in enumerate(zip(requests, members, strict=True)):
            groups.setdefault(self._kind(request, member), []).append(i)
        results: dict[int, LocalResult] = {}
        for group in groups.values():
            together = self._together(
                [requests[i] for i in group], [placed[i] for i in group], [members[i] for i in group]
            )
            results |= zip(group, together, strict=True)
        return [results[i] for i in range(len(requests))]

    def _kind(self, request: Request, member: Member) -> Hashable:
        if self.attackers is not None and request.client in self.attackers.clients:
            return request.client
        received = tuple((name, id(tensors)) for name, tensors in request.records.items())
        return request.assignment.local_steps, request.proximal_mu, id(request.params), received, alike(member)

    def _together(
        self, requests: Sequence[Request], placed: Sequence[Request], members: Sequence[Member]
    ) -> list[LocalResult]:
        if len(requests) > 1:
            try:
                results = self._trained_together(placed, members)
                return [self._to_send(*pair) for pair in zip(placed, results, strict=True)]
            except Unstackable as unstackable:
                say_unstackable(unstackable)
        return [self.client_round(**vars(request)) for request in requests]

    def stack_round(self, requests: Sequence[Request]) -> StackedResults | None:
        """The results of ``client_rounds``, as they are stacked; None if a client's are made of more than its training.

        The unit is not the client, and there are no layers of clients, half of a strategy or attackers among them.
        Raises ``Unstackable``, and the errors of ``client_round``.
        """
        attackers = self.attackers.clients if self.attackers else ()
        if self.config.privacy_unit == "client" or self.personal or self.half:
            return None
        if any(request.client in attackers for request in requests):
            return None
        placed = self._placed(requests)
        members = [self._member(request) for request in placed]
        if len({self._kind(*pair) for pair in zip(requests, members, strict=True)}) != 1:
            return None
        results = self._trained_together(placed, members)
        for request, event in zip(requests, results.events, strict=True):
            _check_ran(event, request.assignment)
        params, state = moved(results.params, CPU), map_tree(lambda t: t.detach().to(CPU), {OPTIMIZER: results.state})
        if any(t.dtype == torch.bfloat16 for t in flatten(state).values()):
            raise Unstackable("an optimizer with a state in bfloat16, which no array holds")
        return dataclasses.replace(results, params=params, state=state)

    def _trained_together(self, placed: Sequence[Request], members: Sequence[Member]) -> StackedResults:
        config = self.config
        if config.engine not in STACKING_ENGINES:
            raise Unstackable(f"engine={config.engine}, which trains one client at a time")
        if config.precision != "float32":
            raise Unstackable(f"precision={config.precision}, whose rounding would differ from that alone")
        results = self._run(placed, members, Stacked)
        assert isinstance(results, StackedResults)
        return results

    def _alone(self, request: Request) -> LocalResult:
        (placed,) = self._placed([request])
        (result,) = self._run([placed], [self._member(placed)], None)
        sent = self._to_send(placed, result)
        within = self.subspace(request.assignment.round)
        if isinstance(within, Coordinates):
            within.check(laid_end_to_end(request.params), laid_end_to_end(sent.params))
        return sent

    def _run(
        self, requests: Sequence[Request], members: Sequence[Member], executor: Callable[..., Executor] | None
    ) -> Sequence[LocalResult]:
        first = requests[0]
        with unchanged(self.loss_fn.module):
            return train(
                {**self.whole(first.params, first.state), **members[0].own},
                members,
                loss_fn=self.loss_fn,
                optimizer=self._optimizer(first),
                clipping=self.local_clipping,
                local_steps=first.assignment.local_steps,
                executor=executor,
                engine=self.config.engine,
                physical_batch_size=self.config.physical_batch_size,
                watch=self.watches.get(first.client) if executor is None else None,
            )

    def _placed(self, requests: Sequence[Request]) -> list[Request]:
        """``requests`` with their tensors on ``device``; requests with common ``params`` keep them common."""
        device, there = self.device, dict[int, Params]()
        if not is_card(device):
            return list(requests)

        def put(params: Params) -> Params:
            if id(params) not in there:
                there[id(params)] = moved(params, device)
            return there[id(params)]

        placed, names = [], {*self.start.names, *self.start.later_names}
        for request in requests:
            state = request.state
            placed.append(
                dataclasses.replace(
                    request,
                    params=put(request.params),
                    records={name: put(tensors) for name, tensors in request.records.items()},
                    state=None if state is None else moved_state(state, names, device),
                )
            )
        return placed

    def _to_send(self, request: Request, result: LocalResult) -> LocalResult:
        """``result`` on the CPU: without what stays in its state, and bounded under the unit "client"."""
        params, event = result.params, result.event
        state: State = {OPTIMIZER: result.state}
        sent: Records = {}
        if self.half is not None:
            finished, state[OPTIMIZER] = self._of_half(request).finished(result.state)
            params, state[HALF], sent = finished.params, finished.state, finished.records
        if result.clip_norm is not None:
            state[CLIPPING] = {"clip_norm": torch.tensor(result.clip_norm)}
        if self.personal:
            params, state[PERSONAL] = without(params, self.personal), only(params, self.personal)
        if self.config.privacy_unit == "client":
            event = request.assignment.event  # the server's release
            params = client_level.bounded_model(
                params, request.params, clip_norm=self.clipping.clip_norm, keep_share=self.config.keep_share
            )
        _check_ran(event, request.assignment)
        state = map_tree(lambda t: t.to(CPU), state)
        sent = {name: moved(tensors, CPU) for name, tensors in sent.items()}
        return dataclasses.replace(result, params=moved(params, CPU), state=state, event=event, records=sent)

    def _optimizer(self, request: Request) -> PrivateOptimizer:
        base = self.optimizer
        if request.proximal_mu:
            base = Proximal(base=base, anchor=request.params, proximal_mu=request.proximal_mu)
        if self.config.local_averaging:
            base = LocalAverage(
                base=base,
                kind=self.config.local_averaging,
                decay=self.config.averaging_decay,
                models=self.config.averaging_models,
                first_step=self._first_step(request),
                steps=request.assignment.local_steps,
            )
        return base if self.half is None else self._of_half(request, base)

    def _of_half(self, request: Request, base: PrivateOptimizer | None = None) -> OfHalf:
        """The client's half of the strategy in the round of ``request``."""
        assert self.half is not None
        return OfHalf(
            base=base or self.optimizer,
            half=self.half,
            received=Received(params=request.params, records=request.records),
            first_step=self._first_step(request),
            steps=steps_of_model(self.half, request.assignment.local_steps),
        )

    def _first_step(self, request: Request) -> int:
        return (request.assignment.round - 1) * self.config.steps_per_round

    def _outgrown(self, request: Request) -> bool:
        """Whether the client's state is of the head alone, and this round trains all layers: it starts again."""
        first = set(self.start.names)
        grown = bool(self.config.unfreeze_round) and request.params.keys() != first
        return grown and _has_part(request.state or {}, first)

    def _member(self, request: Request) -> Member:
        """The client's part of its round: data, state, sampler, mechanism, random streams."""
        config, assignment = self.config, request.assignment
        if assignment.event.privacy_unit != config.privacy_unit:
            raise PrivacyError(
                f"the assignment has the unit {assignment.event.privacy_unit!r}, the run "
                f"privacy_unit={config.privacy_unit!r}"
            )
        kinds = DISTRIBUTIONS.get(config.privacy_unit)
        if kinds and assignment.event.kind != kinds[config.noise_distribution]:
            raise PrivacyError(
                f"the assignment has kind={assignment.event.kind!r}, the run "
                f"noise_distribution={config.noise_distribution!r}"
            )
        indices = torch.from_numpy(self.partitions[request.client])
        persons = self.persons(request.client)
        sampler, mechanism = self._sampler(len(persons or indices), assignment)
        whole = self.whole(request.params, request.state)
        known = request.state is not None and not self._outgrown(request)
        last = (request.state or {}) if known else {}
        if known and (OPTIMIZER not in last or (self.half is not None) != (HALF in last)):
            raise RunError("a client's state is of another version of fed_dpsat; go on with that, or start a new run")
        state, own = self._begun(request, whole, last if known else None)
        return Member(
            batches=Rows(self._batch, indices),
            state=state,
            first_step=self._first_step(request),
            clip_norm=float(last[CLIPPING]["clip_norm"]) if CLIPPING in last else None,
            sampler=sampler,
            mechanism=mechanism,
            own=own,
            groups=lambda batch: self.dataset.train.alike(indices[batch]),
            views=self.views,
            persons=persons,
            streams=Streams(
                seed=config.seed,
                client=request.client,
                round=assignment.round,
                attempt=assignment.attempt,
                noise_source=config.noise_source,
            ),
        )

    def _sampler(self, size: int, assignment: Assignment) -> tuple[PoissonSampler, Mechanism]:
        """Sampler and mechanism of a client of this ``size``, which clients of one size, rate and noise share."""
        key = size, assignment.sample_rate, assignment.local_noise_multiplier
        if key not in self._samplers:
            sampler = PoissonSampler(num_examples=size, sample_rate=assignment.sample_rate)
            mechanism = MECHANISMS[self.config.noise_distribution](
                noise_multiplier=assignment.local_noise_multiplier,
                clip_norm=self.local_clipping.clip_norm,
                expected_batch_size=sampler.expected_batch_size,
            )
            if len(self._samplers) == REMEMBERED_SAMPLERS:
                self._samplers.clear()
            self._samplers[key] = sampler, mechanism
        return self._samplers[key]

    def _begun(self, request: Request, whole: Params, last: State | None) -> tuple[State, Params]:
        """The state that a client begins with, and the parameters of its own that it starts from."""
        if self.half is not None:
            known = last or {}
            begun = self._of_half(request).begin(known.get(HALF, {}), known.get(OPTIMIZER))
            return begun, begun[MODELS]["0"][AT]
        own = only(whole, self.personal)
        return (self.optimizer.init(whole) if last is None else next_round(self.optimizer, whole, last[OPTIMIZER])), own


def say_unstackable(unstackable: Unstackable) -> None:
    """Log once that clients train alone, and the reason."""
    warn_once(f"stack_clients: clients train one after the other: {unstackable}")


def _check_ran(event: PrivacyEvent, assignment: Assignment) -> None:
    if event != assignment.event:
        raise PrivacyError(f"the round ran as {event}, and {assignment.event} was charged; nothing is sent")


def _has_part(tree: State, names: set[str]) -> bool:
    """Whether a part of ``tree`` has the keys ``names``."""
    return tree.keys() == names or any(_has_part(part, names) for part in tree.values() if isinstance(part, dict))
