"""Attacks, the knowledge of an attacker, and the choice of the attackers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fed_dpsat import plugins
from fed_dpsat.data.dataset import Dataset
from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.noise import derive_generator


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The knowledge of an attacker in a round.

    ``update`` is its honest update: the difference of its model from the global one. ``colluders()`` gives the honest
    updates of all attackers under the plan of this one, its own first.
    """

    update: Params
    colluders: Callable[[], list[Params]]
    num_clients: int
    num_attackers: int
    generator: np.random.Generator


class Attack:
    """An honest client; an attack overrides one of the two methods, or both."""

    def poison(self, labels: Tensor, num_classes: int) -> Tensor:
        """``[N]``: the labels that an attacker trains on instead of its own."""
        return labels

    def forge(self, scene: Scene) -> Params:
        """The update that an attacker sends."""
        return scene.update


@dataclass(frozen=True, kw_only=True)
class Attackers:
    """The ``clients`` that carry out an ``attack``."""

    attack: Attack
    clients: tuple[int, ...]

    @classmethod
    def of(cls, config: RunConfig, settings: Mapping[str, Any]) -> Attackers | None:
        """The attackers of ``config``, whose attack takes its arguments from ``settings``; None without an attack.

        Raises ``SettingError`` for an attack that overrides neither method, and so would be honest.
        """
        if not config.attack:
            return None
        attack = plugins.build("attack", config.attack, settings, config.attack_args)
        plugins.required("attack", config.attack, attack)
        kind = type(attack)
        if isinstance(attack, Attack) and kind.forge is Attack.forge and kind.poison is Attack.poison:
            raise SettingError(
                "attack",
                config.attack,
                f"an attack: {kind.__name__} overrides neither forge nor poison, and each attacker would be honest",
                "override forge(self, scene), poison(self, labels, num_classes), or both",
            )
        return cls(attack=attack, clients=choose_attackers(config.num_clients, config.attackers, config.seed))

    def forged(
        self,
        client: int,
        update: Params,
        honest: Callable[[int], Params],
        *,
        num_clients: int,
        generator: np.random.Generator,
    ) -> Params:
        """The update that ``client`` sends instead of ``update``; ``honest`` gives the update of any attacker.

        Raises ``SettingError`` unless it has the names, shapes and types of ``update``, and is finite if that is.
        """
        others = [other for other in self.clients if other != client]
        forged = self.attack.forge(
            Scene(
                update=update,
                colluders=lambda: [update, *map(honest, others)],
                num_clients=num_clients,
                num_attackers=len(self.clients),
                generator=generator,
            )
        )
        if wrong := _misshapen(forged, update):
            raise SettingError(
                "attack",
                type(self.attack).__name__,
                f"one whose forge returns an update like scene.update: it returns {wrong}",
                "return finite tensors of the names, shapes and types of scene.update",
            )
        return {name: forged[name] for name in update}

    def poisoned(self, dataset: Dataset, partitions: Sequence[np.ndarray]) -> Dataset:
        """``dataset`` with the poisoned training labels of the attackers; the test split does not change.

        Raises ``SettingError`` for an attack that poisons labels that are no classes.
        """
        if type(self.attack).poison is Attack.poison:
            return dataset
        labels = dataset.train.labels
        if dataset.train.classes is None or not isinstance(labels, Tensor):
            raise SettingError(
                "attack", type(self.attack).__name__, "possible without classes", "choose one that forges updates"
            )
        labels = labels.clone()
        for client in self.clients:
            own = torch.from_numpy(partitions[client])
            labels[own] = self.attack.poison(labels[own], dataset.num_classes)
        return dataclasses.replace(dataset, train=dataclasses.replace(dataset.train, labels=labels))


def _misshapen(forged: object, update: Params) -> str:
    """The first difference in form of ``forged`` from ``update``, or NaN that ``update`` does not have; or empty."""
    if not isinstance(forged, Mapping):
        return f"a {type(forged).__name__}, not a dict of tensors"
    if forged.keys() != update.keys():
        return f"tensors {list(forged)[:5]}, not {list(update)[:5]}"
    for name, honest in update.items():
        sent = forged[name]
        if not isinstance(sent, Tensor):
            return f"{name} as a {type(sent).__name__}, not a tensor"
        if sent.shape != honest.shape or sent.dtype != honest.dtype:
            return f"{name} as {sent.dtype}{list(sent.shape)}, not {honest.dtype}{list(honest.shape)}"
        if honest.isfinite().all() and not sent.isfinite().all():
            return f"NaN or inf in {name}"
    return ""


def choose_attackers(num_clients: int, share: float, seed: int) -> tuple[int, ...]:
    """``share * num_clients`` clients, rounded, at least one; drawn from the run's seed."""
    number = max(1, round(share * num_clients))
    drawn = derive_generator(seed, purpose="attack").permutation(num_clients)[:number]
    return tuple(sorted(int(client) for client in drawn))
