"""A configuration's names as objects, and what one client does with them in one round."""

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
from fed_dpsat.client.attackers import Attackers, Scene, choose_attackers
from fed_dpsat.client.fingerprint import contents, fingerprint
from fed_dpsat.client.given import copied, renamed
from fed_dpsat.client.personal import PERSONAL, deal_test, only, personal_names, without
from fed_dpsat.data.dataset import Dataset, check_plain
from fed_dpsat.data.parts import disjoint_parts
from fed_dpsat.data.validation import hold_out
from fed_dpsat.errors import ModelError, RunError, SettingError
from fed_dpsat.models.pretrained import load_weights, read_weights, trained_names
from fed_dpsat.models.ties import check_memory, named_tensors
from fed_dpsat.params import Params, laid_end_to_end, map_tree, subtract, trainable
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step import generators
from fed_dpsat.step.clipping import AdaptiveClipping, ClippingRule, FlatClipping, check_clip_norm
from fed_dpsat.step.gradients import compiled
from fed_dpsat.step.gradients.per_example import ModelLoss, check_module
from fed_dpsat.step.gradients.unchanging import check_unchanging, unchanged
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
"""Where a client keeps the state of the optimizer, and the bound of adaptive clipping; see ``PERSONAL`` too."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One client's round: the arguments of ``Experiment.client_round``."""

    client: int
    assignment: Assignment
    params: Params
    state: State | None
    proximal_mu: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Start:
    """Names that are trained, and those from ``unfreeze_round`` on if there is one; the SHA-256 of ``start_from``."""

    names: tuple[str, ...]
    later_names: tuple[str, ...] = ()
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The objects of a run. Clients and server build the same ones from the same configuration.

    The model is where it is computed with; parameters and states come from the CPU and go there.
    ``named`` says that every object came from a name in it, so that another process can build them too. ``attackers``
    train on labels of their own in ``dataset``, and forge what they send. ``personal`` names the parameters that stay
    on the client. ``watches`` see the private gradients of clients that train alone, in an audit. Raises ``DataError``
    for ``partitions`` that are none of ``dataset`` (``disjoint_parts``), and for splits of a class other than
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
        """From the names in ``config``; a copy of an object that is given stands in for its name.

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
            "labels": dataset.train.labels.numpy().copy(),  # a plug-in that writes into it changes no data
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
            check_memory(plugins.required("model", config.model, model))  # which a copy would part
            model = copied("model", model)
        model, start = _started(plugins.required("model", config.model, model), config)
        _require_float32(model, start, config.model)
        if optimizer is None:
            optimizer = build_optimizer(config.optimizer, config.base_optimizer, settings, config.optimizer_args)
        else:
            optimizer = copied("optimizer", plugins.required("optimizer", config.optimizer, optimizer))
        if clipping is None:
            clipping = plugins.build("clipping", config.clipping, settings, config.clipping_args)
        else:
            clipping = copied("clipping", clipping)
        plugins.required("clipping", config.clipping, clipping)
        attackers = _attackers(config, settings)
        module = module_on(model, torch_device(config.device))
        _check_unchanging(module, dataset.input_shape)
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
        """What is trained in ``round``, by its initial values."""
        return {name: p.detach().to(CPU, copy=True) for name, p in self._trained(round).items()}

    @property
    def unused_examples(self) -> int:
        """How many training examples are in no part: nobody trains on them."""
        return len(self.dataset.train) - sum(len(part) for part in self.partitions)

    @functools.cached_property
    def contents(self) -> dict[str, str]:
        """Digests of clients, data, and what of the model is not sent: the same for every process of a run."""
        sent = without(dict(self.loss_fn.module.named_parameters()), self.personal).keys() & self.start.names
        return contents(self.dataset, self.partitions, self.loss_fn.module, sent)

    @property
    def fingerprint(self) -> str:
        """One digest of the ``contents``."""
        return fingerprint(self.contents)

    @functools.cached_property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self.loss_fn.module)

    def _trained(self, round: int) -> dict[str, nn.Parameter]:
        later = self.start.later_names if 0 < self.config.unfreeze_round <= round else ()
        names = set(later or self.start.names)
        return {name: p for name, p in self.loss_fn.module.named_parameters() if name in names}

    def shared(self, round: int = 1) -> Params:
        """The initial parameters that leave clients in ``round`` and are averaged: all but the ``personal`` ones."""
        return without(self.trained(round), self.personal)

    def whole(self, shared: Params, state: State | None) -> Params:
        """A client's model: the ``shared`` part and its own, kept in ``state`` or else the initial one."""
        if not self.personal:
            return shared
        # with personal layers, what is trained stays the same
        initial = moved(self.trained(1), device_of(shared))
        own = (state or {}).get(PERSONAL, only(initial, self.personal))
        return {name: own[name] if name in self.personal else shared[name] for name in initial}

    @functools.cached_property
    def test_shares(self) -> list[np.ndarray]:
        """By client, its share of the public test split."""
        labels, public = self.dataset.train.labels.numpy(), self.dataset.test.labels.numpy()
        return deal_test(labels, public, self.partitions, derive_seed(self.config.seed, purpose="partition"))

    @property
    def local_clipping(self) -> ClippingRule:
        """What bounds an example in local training: nothing, where it is the client's whole change that is bounded."""
        return self.clipping if self.config.privacy_unit == "example" else FlatClipping(clip_norm=math.inf)

    def carried_state(self) -> set[str]:
        """What a client takes from one round into its next, by name."""
        adaptive = isinstance(self.clipping, AdaptiveClipping)
        others = {CLIPPING: adaptive, PERSONAL: bool(self.personal)}
        return carried_names(self.optimizer) | {name for name, kept in others.items() if kept}

    def subspace(self, round: int) -> Coordinates | Span | None:
        """What ``round`` (from 1) can change, if the optimizer says so; None where replies are whole models.

        They are under secure aggregation, whose masks need every coordinate, and with layers that stay on clients.
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
        """One round of ``client`` from the global ``params``; ``state`` is what it kept from its last one.

        ``proximal_mu`` is what FedProx asks for.

        Raises ``SettingError`` for an assignment that no mechanism or sampler accepts, and ``PrivacyError`` for one of
        another unit than the run's, or if what ran costs something else than its event.
        """
        result = self._train(client, assignment, params, state, proximal_mu)
        if self.attackers is None or client not in self.attackers.clients:
            return result
        honest = subtract(result.params, params)
        others = [other for other in self.attackers.clients if other != client]
        forged = self.attackers.attack.forge(
            Scene(
                update=honest,
                colluders=lambda: [
                    honest,
                    *(
                        subtract(self._train(other, assignment, params, None, proximal_mu).params, params)
                        for other in others
                    ),
                ],
                num_clients=self.config.num_clients,
                num_attackers=len(self.attackers.clients),
                generator=derive_generator(
                    self.config.seed,
                    purpose="attack",
                    client=client,
                    round=assignment.round,
                    attempt=assignment.attempt,
                ),
            )
        )
        return dataclasses.replace(result, params={name: params[name] + u for name, u in forged.items()})

    def client_rounds(self, requests: Sequence[Request]) -> list[LocalResult]:
        """As ``client_round`` for each, to about 1e-6 relative: trained together where they can be.

        Together are those with equal ``local_steps``, the same ``params`` object and states of one form. Who attacks
        trains alone; and so does everyone under an engine that was chosen by name, or with a loss,
        rule or optimizer that cannot be stacked, which the log says once. Raises what ``client_round`` raises.
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
                _say_once(str(unstackable))
        return [self.client_round(**vars(request)) for request in requests]

    def _train(
        self,
        client: int,
        assignment: Assignment,
        params: Params,
        state: State | None,
        proximal_mu: float,
    ) -> LocalResult:
        asked = Request(
            client=client,
            assignment=assignment,
            params=params,
            state=state,
            proximal_mu=proximal_mu,
        )
        (request,) = self._placed([asked])
        (sent,) = self._run([request], [self._member(request)], None)
        within = self.subspace(assignment.round)
        if isinstance(within, Coordinates):
            within.check(laid_end_to_end(params), laid_end_to_end(sent.params))
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
        """``requests`` with their tensors on ``device``; those that share ``params`` still do."""
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
        """``result`` without the client's own parameters, which its state keeps, and bounded as the unit wants it.

        On the CPU, where it was on the card.
        """
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
        """Whether the client's state is of the head alone, and all layers are trained now: it begins anew."""
        first = set(self.start.names)
        grown = bool(self.config.unfreeze_round) and request.params.keys() != first
        return grown and _has_part(request.state or {}, first)

    def _member(self, request: Request) -> Member:
        """What is the client's own of its round: data, state, sampler, mechanism, streams."""
        config, assignment = self.config, request.assignment
        if assignment.event.privacy_unit != config.privacy_unit:
            raise PrivacyError(
                f"the assignment has the unit {assignment.event.privacy_unit!r}, the run "
                f"privacy_unit={config.privacy_unit!r}"
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


@functools.cache
def _say_once(reason: str) -> None:
    log.warning("stack_clients: clients train one after the other: %s", reason)


def _has_part(tree: State, names: set[str]) -> bool:
    """Whether ``names`` are those of a part of ``tree``."""
    return tree.keys() == names or any(_has_part(part, names) for part in tree.values() if isinstance(part, dict))


def _check_unchanging(module: nn.Module, input_shape: tuple[int, ...]) -> None:
    check_module(module)  # the name of a layer that mixes examples says more than that of its statistics
    shape = (2, *input_shape)
    inputs = (torch.arange(math.prod(shape)) % 2).float().view(shape)  # pixels, features and numbers of tokens alike
    try:
        check_unchanging(module, inputs.to(device_of(module)))
    except ModelError:
        raise
    except Exception as error:  # one that fails in a pass fails by itself, where it is trained
        log.debug(
            "not known whether passes change %s, which fails on made-up examples: %s", type(module).__name__, error
        )


@contextmanager
def _seeded(config: RunConfig, purpose: Purpose) -> Iterator[None]:
    """A factory may draw from any generator: the same for a seed; afterwards they are as they were."""
    with generators.kept(CPU):
        generators.seed(CPU, derive_seed(config.seed, purpose=purpose))
        yield


def _started(model: nn.Module, config: RunConfig) -> tuple[nn.Module, Start]:
    """``model`` with the weights of ``start_from`` and frozen as ``train_layers`` says."""
    sha256 = ""
    check_memory(model)
    if config.start_from:
        weights, sha256 = read_weights(config.start_from)
        load_weights(model, weights, config.start_from, new_head=config.start_head == "new")
    everything = trained_names(model, "all", 0)
    names = trained_names(model, config.train_layers, config.last_layers)
    for name, p in model.named_parameters():
        if name not in names:
            p.requires_grad_(False)
    later = everything if config.train_layers == "head-then-all" else []
    return model, Start(names=tuple(names), later_names=tuple(later), sha256=sha256)


def _require_float32(model: nn.Module, start: Start, name: str) -> None:
    """Noise and sums are float32: in float16 both are rounded away, and float64 meets inputs of float32."""
    trained = {*start.names, *start.later_names}
    for parameter, p in model.named_parameters():
        if parameter in trained and p.dtype != torch.float32:
            raise SettingError(
                "model",
                name,
                f"of float32 parameters ({parameter} is {str(p.dtype).removeprefix('torch.')})",
                "build it in float32, or call .float() on it; precision=bfloat16 computes its layers in bfloat16",
            )


def _attackers(config: RunConfig, settings: Mapping[str, Any]) -> Attackers | None:
    if not config.attack:
        return None
    attack = plugins.build("attack", config.attack, settings, config.attack_args)
    plugins.required("attack", config.attack, attack)
    return Attackers(attack=attack, clients=choose_attackers(config.num_clients, config.attackers, config.seed))
