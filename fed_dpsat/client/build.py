"""The objects that a configuration names, and the round of a client with them."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from fed_dpsat import plugins
from fed_dpsat.accounting.event import PrivacyError
from fed_dpsat.accounting.plans import read_table
from fed_dpsat.client import unit as client_level
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.attackers import Attackers
from fed_dpsat.client.fingerprint import contents, fingerprint
from fed_dpsat.client.given import copied, renamed
from fed_dpsat.client.personal import PERSONAL, deal_test, only, personal_names, without
from fed_dpsat.client.start import Start, begin, check_passes
from fed_dpsat.data.dataset import Dataset, check_plain
from fed_dpsat.data.parts import disjoint_parts
from fed_dpsat.data.validation import hold_out
from fed_dpsat.errors import RunError, SettingError, warn_once
from fed_dpsat.models.ties import check_memory, named_tensors
from fed_dpsat.params import Params, laid_end_to_end, map_tree, subtract, trainable
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step import generators
from fed_dpsat.step.clipping import AdaptiveClipping, ClippingRule, FlatClipping, check_clip_norm
from fed_dpsat.step.gradients import compiled
from fed_dpsat.step.gradients.per_example import ModelLoss
from fed_dpsat.step.gradients.unchanging import unchanged
from fed_dpsat.step.loop import Executor, LocalResult, Member, Streams, Watch, train
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.noise import Purpose, derive_generator, derive_seed
from fed_dpsat.step.optimizers.base import PrivateOptimizer, State, carried_names, next_round, subspace_of
from fed_dpsat.step.optimizers.chain import build_optimizer
from fed_dpsat.step.optimizers.proximal import Proximal
from fed_dpsat.step.placement import CPU, decided, device_of, is_card, module_on, moved, moved_state, torch_device
from fed_dpsat.step.sampling import PoissonSampler
from fed_dpsat.step.stacked import Stacked, Unstackable, alike
from fed_dpsat.step.subspace import Coordinates, Span

log = logging.getLogger("fed_dpsat")

STACKING_ENGINES = ("auto", "vmap")

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


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The objects of a run. Clients and server build the same objects from the same configuration.

    The model is on the device of the computation; parameters and states come from the CPU and return to it.
    ``named`` is true if every object came from a name, so that another process can build it too. ``attackers`` train
    on their poisoned labels in ``dataset``, and forge their updates. ``personal`` names the parameters that stay on the
    client. ``watches`` see the private gradients of clients that train alone, in an audit. Raises ``DataError`` for
    ``partitions`` that do not divide ``dataset`` (``disjoint_parts``), and for splits of a class other than
    ``Examples``, whose batches may mix examples.
    """

    config: RunConfig
    dataset: Dataset
    partitions: Sequence[np.ndarray]
    loss_fn: ModelLoss
    optimizer: PrivateOptimizer
    clipping: ClippingRule
    budgets: Sequence[float]
    named: bool = True
    attackers: Attackers | None = None
    start: Start
    personal: frozenset[str] = frozenset()
    watches: Mapping[int, Watch] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.config
        check_clip_norm(self.clipping.clip_norm)
        check_plain(self.dataset)
        parts = disjoint_parts(
            self.partitions,
            num_clients=config.num_clients,
            num_examples=len(self.dataset.train),
            partition=config.partition,
        )
        object.__setattr__(self, "partitions", parts)

    @classmethod
    def build(
        cls,
        config: RunConfig,
        *,
        dataset: Dataset | None = None,
        model: nn.Module | None = None,
        optimizer: PrivateOptimizer | None = None,
        clipping: ClippingRule | None = None,
    ) -> Experiment:
        """Build from the names in ``config``; a copy of a given object replaces its name.

        The model is moved to ``config.device``. Raises ``SettingError``, ``PluginError`` or ``DataError`` before any
        client is asked.
        """
        config = renamed(decided(config), dataset=dataset, model=model, optimizer=optimizer, clipping=clipping)
        config = dataclasses.replace(config, kernels=compiled.decided(config.kernels))
        named = dataset is None and model is None and optimizer is None and clipping is None
        settings: dict[str, Any] = {**config.settings(), "total_steps": config.total_steps}
        settings["steps_per_round"] = config.steps_per_round
        if dataset is None:
            with _seeded(config, "partition"):
                dataset = plugins.build("dataset", config.dataset, settings, config.dataset_args)
        check_plain(plugins.required("dataset", config.dataset, dataset))
        if config.validation_share:
            dataset = hold_out(dataset, config.validation_share, derive_seed(config.seed, purpose="validation"))
        if config.num_clients > len(dataset.train):
            raise SettingError(
                "num_clients",
                config.num_clients,
                f"at most {len(dataset.train)}, the examples of {dataset.name}",
                "lower it; a client needs at least one example",
            )
        settings |= {
            "input_shape": dataset.input_shape,
            "num_classes": dataset.num_classes,
            "labels": dataset.train.labels.numpy().copy(),  # a plug-in may write into it
        }
        partition_settings = {
            **settings,
            "seed": derive_seed(config.seed, purpose="partition"),
            "labels": settings["labels"].copy(),
        }
        with _seeded(config, "partition"):
            parts = plugins.build("partition", config.partition, partition_settings, config.partition_args)
        partitions = disjoint_parts(
            parts,
            num_clients=config.num_clients,
            num_examples=len(dataset.train),
            partition=config.partition,
        )
        if model is None:
            with _seeded(config, "model"):
                model = plugins.build("model", config.model, settings, config.model_args)
        else:
            check_memory(plugins.required("model", config.model, model))  # a copy would separate shared memory
            model = copied("model", model)
        start = begin(plugins.required("model", config.model, model), config)
        if optimizer is None:
            optimizer = build_optimizer(config.optimizer, config.base_optimizer, settings, config.optimizer_args)
        else:
            optimizer = copied("optimizer", plugins.required("optimizer", config.optimizer, optimizer))
        if clipping is None:
            clipping = plugins.build("clipping", config.clipping, settings, config.clipping_args)
        else:
            clipping = copied("clipping", clipping)
        plugins.required("clipping", config.clipping, clipping)
        attackers = Attackers.of(config, settings)
        module = module_on(model, torch_device(config.device))
        check_passes(module, dataset.input_shape)
        return cls(
            config=config,
            dataset=attackers.poisoned(dataset, partitions) if attackers else dataset,
            partitions=partitions,
            loss_fn=ModelLoss(module, precision=config.precision, kernels=config.kernels),
            optimizer=optimizer,
            clipping=clipping,
            budgets=[row.target_epsilon for row in read_table(config)],
            named=named,
            attackers=attackers,
            start=start,
            personal=personal_names(trainable(model), config.personal_layers, named_tensors(model)),
        )

    def trained(self, round: int) -> Params:
        """The parameters that ``round`` trains, with their initial values."""
        return {name: p.detach().to(CPU, copy=True) for name, p in self._trained(round).items()}

    @property
    def unused_examples(self) -> int:
        """The number of training examples that no client holds."""
        return len(self.dataset.train) - sum(len(part) for part in self.partitions)

    @functools.cached_property
    def contents(self) -> dict[str, str]:
        """Digests of partition, data, and the unsent part of the model: equal in every process of a run."""
        sent = without(dict(self.loss_fn.module.named_parameters()), self.personal).keys() & self.start.names
        return contents(self.dataset, self.partitions, self.loss_fn.module, sent)

    @property
    def fingerprint(self) -> str:
        """One digest of the ``contents``."""
        return fingerprint(self.contents)

    @functools.cached_property
    def device(self) -> torch.device:
        """The device of the model."""
        return device_of(self.loss_fn.module)

    def _trained(self, round: int) -> dict[str, nn.Parameter]:
        later = self.start.later_names if 0 < self.config.unfreeze_round <= round else ()
        names = set(later or self.start.names)
        return {name: p for name, p in self.loss_fn.module.named_parameters() if name in names}

    def shared(self, round: int = 1) -> Params:
        """The initial values of the parameters that ``round`` sends and averages: all but the ``personal`` ones."""
        return without(self.trained(round), self.personal)

    def whole(self, shared: Params, state: State | None) -> Params:
        """A client's model: the ``shared`` part, and its own part from ``state`` or else the initial one."""
        if not self.personal:
            return shared
        # with personal layers, what is trained stays the same
        initial = moved(self.trained(1), device_of(shared))
        own = (state or {}).get(PERSONAL, only(initial, self.personal))
        return {name: own[name] if name in self.personal else shared[name] for name in initial}

    @functools.cached_property
    def test_shares(self) -> list[np.ndarray]:
        """The share of each client of the public test split."""
        labels, public = self.dataset.train.labels.numpy(), self.dataset.test.labels.numpy()
        return deal_test(labels, public, self.partitions, derive_seed(self.config.seed, purpose="partition"))

    @property
    def local_clipping(self) -> ClippingRule:
        """The clipping of examples in local training: none if the unit is the client, whose whole change is clipped."""
        return self.clipping if self.config.privacy_unit == "example" else FlatClipping(clip_norm=math.inf)

    def carried_state(self) -> set[str]:
        """Names of the state that a client keeps from one round to the next."""
        adaptive = isinstance(self.clipping, AdaptiveClipping)
        others = {CLIPPING: adaptive, PERSONAL: bool(self.personal)}
        return carried_names(self.optimizer) | {name for name, kept in others.items() if kept}

    def subspace(self, round: int) -> Coordinates | Span | None:
        """The subspace of ``round`` (from 1), if the optimizer has one; None if replies are whole models.

        Replies are whole models under secure aggregation, whose masks need every coordinate, and with personal layers.
        """
        if self.config.secure_aggregation or self.personal:
            return None
        return subspace_of(self.optimizer, round, sum(p.numel() for p in self._trained(round).values()))

    def client_round(
        self,
        client: int,
        assignment: Assignment,
        params: Params,
        state: State | None,
        proximal_mu: float = 0.0,
    ) -> LocalResult:
        """One round of ``client`` from the global ``params``; ``state`` is its state after its last round.

        ``proximal_mu`` is the weight of FedProx. Raises ``SettingError`` for an assignment that no mechanism or sampler
        accepts, and ``PrivacyError`` for an assignment of another unit, or if the event that ran is not the assigned
        one.
        """
        request = Request(client=client, assignment=assignment, params=params, state=state, proximal_mu=proximal_mu)
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
        return request.assignment.local_steps, request.proximal_mu, id(request.params), alike(member)

    def _together(
        self, requests: Sequence[Request], placed: Sequence[Request], members: Sequence[Member]
    ) -> list[LocalResult]:
        config = self.config
        if len(requests) > 1:
            try:
                if config.engine not in STACKING_ENGINES:
                    raise Unstackable(f"engine={config.engine}, which trains one client at a time")
                if config.precision != "float32":
                    raise Unstackable(f"precision={config.precision}, whose rounding would differ from that alone")
                return self._run(placed, members, Stacked)
            except Unstackable as unstackable:
                warn_once(f"stack_clients: clients train one after the other: {unstackable}")
        return [self.client_round(**vars(request)) for request in requests]

    def _alone(self, request: Request) -> LocalResult:
        (placed,) = self._placed([request])
        (sent,) = self._run([placed], [self._member(placed)], None)
        within = self.subspace(request.assignment.round)
        if isinstance(within, Coordinates):
            within.check(laid_end_to_end(request.params), laid_end_to_end(sent.params))
        return sent

    def _run(
        self, requests: Sequence[Request], members: Sequence[Member], executor: Callable[..., Executor] | None
    ) -> list[LocalResult]:
        first = requests[0]
        with unchanged(self.loss_fn.module):
            results = train(
                self.whole(first.params, first.state),
                members,
                loss_fn=self.loss_fn,
                optimizer=self._optimizer(first.params, first.proximal_mu),
                clipping=self.local_clipping,
                local_steps=first.assignment.local_steps,
                executor=executor,
                engine=self.config.engine,
                physical_batch_size=self.config.physical_batch_size,
                watch=self.watches.get(first.client) if executor is None else None,
            )
        return [self._to_send(*pair) for pair in zip(requests, results, strict=True)]

    def _placed(self, requests: Sequence[Request]) -> list[Request]:
        """``requests`` with their tensors on ``device``; requests with common ``params`` keep them common."""
        device, there = self.device, dict[int, Params]()
        if not is_card(device):
            return list(requests)
        placed, names = [], {*self.start.names, *self.start.later_names}
        for request in requests:
            if id(request.params) not in there:
                there[id(request.params)] = moved(request.params, device)
            state = request.state
            placed.append(
                dataclasses.replace(
                    request,
                    params=there[id(request.params)],
                    state=None if state is None else moved_state(state, names, device),
                )
            )
        return placed

    def _to_send(self, request: Request, result: LocalResult) -> LocalResult:
        """``result`` on the CPU, with personal parameters in its state, and bounded under the unit "client"."""
        params, event = result.params, result.event
        state: State = {OPTIMIZER: result.state}
        if result.clip_norm is not None:
            state[CLIPPING] = {"clip_norm": torch.tensor(result.clip_norm)}
        if self.personal:
            params, state[PERSONAL] = without(params, self.personal), only(params, self.personal)
        if self.config.privacy_unit == "client":
            event = request.assignment.event  # the server's release
            params = client_level.bounded_model(
                params, request.params, clip_norm=self.clipping.clip_norm, keep_share=self.config.keep_share
            )
        if event != request.assignment.event:
            raise PrivacyError(f"the round ran as {event}, and {request.assignment.event} was charged; nothing is sent")
        state = map_tree(lambda t: t.to(CPU), state)
        return dataclasses.replace(result, params=moved(params, CPU), state=state, event=event)

    def _optimizer(self, params: Params, proximal_mu: float) -> PrivateOptimizer:
        if not proximal_mu:
            return self.optimizer
        return Proximal(base=self.optimizer, anchor=params, proximal_mu=proximal_mu)

    def _outgrown(self, request: Request) -> bool:
        """Whether the client's state is of the head alone, and this round trains all layers: it starts again."""
        first = set(self.start.names)
        grown = bool(self.config.unfreeze_round) and request.params.keys() != first
        return grown and _has_part(request.state or {}, first)

    def _member(self, request: Request) -> Member:
        """The client's part of its round: data, state, sampler, mechanism, random streams."""
        config, assignment = self.config, request.assignment
        if assignment.event.unit != config.privacy_unit:
            raise PrivacyError(
                f"asked in the unit {assignment.event.unit!r}, but the run's privacy_unit={config.privacy_unit!r}"
            )
        indices = torch.from_numpy(self.partitions[request.client])
        sampler = PoissonSampler(num_examples=len(indices), sample_rate=assignment.sample_rate)
        whole = self.whole(request.params, request.state)
        known = request.state is not None and not self._outgrown(request)
        last = (request.state or {}) if known else {}
        if known and OPTIMIZER not in last:
            raise RunError("a client's state is of another version of fed_dpsat; go on with that, or start a new run")
        mechanism = GaussianMechanism(
            noise_multiplier=assignment.local_noise_multiplier,
            clip_norm=self.local_clipping.clip_norm,
            expected_batch_size=sampler.expected_batch_size,
        )
        return Member(
            batches=lambda batch: self.dataset.train.batch(indices[batch], self.device),
            state=next_round(self.optimizer, whole, last[OPTIMIZER]) if known else self.optimizer.init(whole),
            first_step=(assignment.round - 1) * config.steps_per_round,
            clip_norm=float(last[CLIPPING]["clip_norm"]) if CLIPPING in last else None,
            sampler=sampler,
            mechanism=mechanism,
            own=only(whole, self.personal),
            streams=Streams(
                seed=config.seed,
                client=request.client,
                round=assignment.round,
                attempt=assignment.attempt,
                noise_source=config.noise_source,
            ),
        )


def _has_part(tree: State, names: set[str]) -> bool:
    """Whether a part of ``tree`` has the keys ``names``."""
    return tree.keys() == names or any(_has_part(part, names) for part in tree.values() if isinstance(part, dict))


@contextmanager
def _seeded(config: RunConfig, purpose: Purpose) -> Iterator[None]:
    """Seed all generators for a factory, and restore them afterwards."""
    with generators.kept(CPU):
        generators.seed(CPU, derive_seed(config.seed, purpose=purpose))
        yield
