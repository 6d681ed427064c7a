"""A multiple of the honest update, which dominates the mean (Bagdasaryan et al. 2020)."""

from __future__ import annotations

from fed_dpsat.client.attackers import Attack, Scene
from fed_dpsat.params import Params


class Scaling(Attack):
    """Sends `factor` times the honest update, which dominates the mean (Bagdasaryan et al. 2020)."""

    def __init__(self, factor: float = 100.0) -> None:
        self.factor = factor

    def forge(self, scene: Scene) -> Params:
        return {name: self.factor * u for name, u in scene.update.items()}


ATTACKS = {"scaling": Scaling}
