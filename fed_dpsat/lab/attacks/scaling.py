"""A client that shouts: its honest update, many times over, so that the mean is its own (Bagdasaryan et al. 2020)."""

from __future__ import annotations

from fed_dpsat.client.attackers import Attack, Scene
from fed_dpsat.params import Params


class Scaling(Attack):
    """Sends ``factor`` times its honest update."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def forge(self, scene: Scene) -> Params:
        return {name: self.factor * u for name, u in scene.update.items()}


def scaling(factor: float = 100.0) -> Attack:
    """Sends the honest update `factor` times over: its own noise and drift drown the others."""
    return Scaling(factor)


ATTACKS = {"scaling": scaling}
