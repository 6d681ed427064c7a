"""What an attack is, what an attacker knows, and who attacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fed_dpsat.data.dataset import Dataset
from fed_dpsat.params import Params
from fed_dpsat.step.noise import derive_generator


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an attacker knows in a round.

    ``update``: what it would honestly send, less the global model; ``colluders()``: that of every attacker, its own
    first, as the plan of this one would have them train.
    """

    update: Params
    colluders: Callable[[], list[Params]]
    num_clients: int
    num_attackers: int
    generator: np.random.Generator


class Attack:
    """Honest as it stands; an attack overrides one of the two, or both."""

    def poison(self, labels: Tensor, num_classes: int) -> Tensor:
        """``[N]``: the labels an attacker trains on, in the place of its own."""
        return labels

    def forge(self, scene: Scene) -> Params:
        """The update an attacker sends."""
        return scene.update


@dataclass(frozen=True, kw_only=True)
class Attackers:
    """The ``clients`` that carry out an ``attack``."""

    attack: Attack
    clients: tuple[int, ...]

    def poisoned(self, dataset: Dataset, partitions: Sequence[np.ndarray]) -> Dataset:
        """``dataset`` with the training labels of attackers as the attack has them; the test split stays."""
        labels = dataset.train.labels.clone()
        for client in self.clients:
            own = torch.from_numpy(partitions[client])
            labels[own] = self.attack.poison(labels[own], dataset.num_classes)
        return dataclasses.replace(dataset, train=dataclasses.replace(dataset.train, labels=labels))


def choose_attackers(num_clients: int, share: float, seed: int) -> tuple[int, ...]:
    """``share * num_clients`` clients, rounded, at least one; drawn from the run's seed."""
    number = max(1, round(share * num_clients))
    drawn = derive_generator(seed, purpose="attack").permutation(num_clients)[:number]
    return tuple(sorted(int(client) for client in drawn))
