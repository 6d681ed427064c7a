"""A model of one's own in the place of the mean (Bagdasaryan et al., AISTATS 2020, arXiv 1807.00459)."""

from __future__ import annotations

from fed_dpsat.client.attackers import Scene
from fed_dpsat.lab.attacks.label_flip import LabelFlip
from fed_dpsat.params import Params


class ModelReplacement(LabelFlip):
    """Trains on flipped labels and sends that update ``num_clients / num_attackers`` times over.

    Where the others cancel out, the mean of all is what attackers trained.
    """

    def forge(self, scene: Scene) -> Params:
        boost = scene.num_clients / scene.num_attackers
        return {name: boost * u for name, u in scene.update.items()}


def model_replacement() -> ModelReplacement:
    """Trains on flipped labels and boosts the update so that the mean becomes its model (Bagdasaryan et al. 2020)."""
    return ModelReplacement()


ATTACKS = {"model-replacement": model_replacement}
