"""A configuration's names as objects, and what one client does with them in one round."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fed_dpsat import plugins
from fed_dpsat.attacks import Attackers, Scene, choose_attackers
from fed_dpsat.clipping import AdaptiveClipping, ClippingRule
from fed_dpsat.config import RunConfig
from fed_dpsat.data.dataset import Dataset
from fed_dpsat.errors import SettingError
from fed_dpsat.mechanism import GaussianMechanism
from fed_dpsat.noise import derive_generator, derive_seed
from fed_dpsat.optimizers.base import ASCENT, CLOCK, PrivateOptimizer, State, set_clock
from fed_dpsat.optimizers.proximal import Proximal
from fed_dpsat.params import Params, subtract, trainable, zeros_like
from fed_dpsat.per_example import ModelLoss
from fed_dpsat.plans import read_table
from fed_dpsat.privacy import PrivacyEvent
from fed_dpsat.sampling import PoissonSampler
from fed_dpsat.training import LocalResult, Streams, train_locally


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the server asks of a client in one round, and so what the round costs it."""

    round: int
    noise_multiplier: float
    sample_rate: float
    local_steps: int
    attempt: int = 0

    @property
    def event(self) -> PrivacyEvent:
        """What doing it costs."""
        return PrivacyEvent(
            noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=self.local_steps
        )


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The objects of a run. Clients and server build the same ones from the same configuration.

    ``named`` says that every object came from a name in it, so that another process can build them too. ``attackers``
    train on labels of their own in ``dataset``, and forge what they send.
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
        """From the names in ``config``; an object that is given stands in for its name.

        Raises ``SettingError``, ``PluginError`` or ``DataError`` before any client is asked.
        """
        named = dataset is None and model is None and optimizer is None and clipping is None
        settings: dict[str, Any] = {**config.settings(), "total_steps": config.total_steps}
        dataset = dataset or plugins.build("dataset", config.dataset, settings)
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
            "labels": dataset.train.labels.numpy(),
        }
        partition_settings = {**settings, "seed": derive_seed(config.seed, purpose="partition")}
        partitions = plugins.build("partition", config.partition, partition_settings)
        if model is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(config.seed, purpose="model"))
                model = plugins.build("model", config.model, settings)
        if optimizer is None:
            settings["base"] = plugins.build("optimizer", config.base_optimizer, settings)
            optimizer = plugins.build("optimizer", config.optimizer, settings)
        clipping = clipping or plugins.build("clipping", config.clipping, settings)
        attackers = _attackers(config, settings)
        return cls(
            config=config,
            dataset=attackers.poisoned(dataset, partitions) if attackers else dataset,
            partitions=partitions,
            loss_fn=ModelLoss(model, precision=config.precision),
            optimizer=optimizer,
            clipping=clipping,
            budgets=[row.target_epsilon for row in read_table(config)],
            named=named,
            attackers=attackers,
        )

    def carried_state(self) -> set[str]:
        """Slots of state that a client takes from one round into its next, found by one update on zeros."""
        params = zeros_like(trainable(self.loss_fn.module))
        _, state = self.optimizer.update(params, params, self.optimizer.init(params))
        forgotten = {CLOCK} if self.config.ascent_memory == "client" else {CLOCK, ASCENT}
        return (state.keys() - forgotten) | ({"clipping"} if isinstance(self.clipping, AdaptiveClipping) else set())

    def client_round(
        self,
        client: int,
        task: Task,
        params: Params,
        state: State | None,
        server_ascent: Params | None = None,
        proximal_mu: float = 0.0,
    ) -> LocalResult:
        """One round of ``client`` from the global ``params``; ``state`` is what it kept from its last one.

        ``proximal_mu`` is what FedProx asks for.

        Raises ``SettingError`` for a task that no mechanism or sampler accepts.
        """
        result = self._train(client, task, params, state, server_ascent, proximal_mu)
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
                        subtract(self._train(other, task, params, None, server_ascent, proximal_mu).params, params)
                        for other in others
                    ),
                ],
                num_clients=self.config.num_clients,
                num_attackers=len(self.attackers.clients),
                generator=derive_generator(
                    self.config.seed, purpose="attack", client=client, round=task.round, attempt=task.attempt
                ),
            )
        )
        return dataclasses.replace(result, params={name: params[name] + u for name, u in forged.items()})

    def _train(
        self,
        client: int,
        task: Task,
        params: Params,
        state: State | None,
        server_ascent: Params | None,
        proximal_mu: float,
    ) -> LocalResult:
        config = self.config
        indices = torch.from_numpy(self.partitions[client])
        sampler = PoissonSampler(num_examples=len(indices), sample_rate=task.sample_rate)
        state = self.optimizer.init(params) if state is None else dict(state)
        if config.ascent_memory != "client":
            state.pop(ASCENT, None)
        if config.ascent_memory == "server" and server_ascent is not None:
            state[ASCENT] = server_ascent
        optimizer = self.optimizer
        if proximal_mu:
            optimizer = Proximal(base=optimizer, anchor=params, proximal_mu=proximal_mu)
        mechanism = GaussianMechanism(
            noise_multiplier=task.noise_multiplier,
            clip_norm=self.clipping.clip_norm,
            expected_batch_size=sampler.expected_batch_size,
        )
        return train_locally(
            params,
            lambda batch: self.dataset.train.batch(indices[batch]),
            loss_fn=self.loss_fn,
            optimizer=optimizer,
            state=set_clock(state, (task.round - 1) * config.steps_per_round),
            sampler=sampler,
            clipping=self.clipping,
            mechanism=mechanism,
            local_steps=task.local_steps,
            streams=Streams(
                seed=config.seed,
                client=client,
                round=task.round,
                attempt=task.attempt,
                noise_source=config.noise_source,
            ),
            engine=config.engine,
            physical_batch_size=config.physical_batch_size,
        )


def _attackers(config: RunConfig, settings: Mapping[str, Any]) -> Attackers | None:
    if not config.attack:
        return None
    attack = plugins.build("attack", config.attack, settings, config.attack_args)
    return Attackers(attack=attack, clients=choose_attackers(config.num_clients, config.attackers, config.seed))
