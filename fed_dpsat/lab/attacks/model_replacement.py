"""Replacement of the mean by the model of the attackers (Bagdasaryan et al., AISTATS 2020, arXiv 1807.00459)."""

from __future__ import annotations

from fed_dpsat.client.attackers import Scene
from fed_dpsat.lab.attacks.label_flip import LabelFlip
from fed_dpsat.params import Params


class ModelReplacement(LabelFlip):
    """Trains on flipped labels and boosts the update so that the mean becomes its model (Bagdasaryan et al. 2020).

    If the honest updates cancel out, the mean of all models is the model of the attackers.
    """

    def forge(self, scene: Scene) -> Params:
        boost = scene.num_clients / scene.num_attackers
        return {name: boost * u for name, u in scene.update.items()}


ATTACKS = {"model-replacement": ModelReplacement}
