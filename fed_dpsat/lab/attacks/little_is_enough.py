"""A shift that hides among honest clients (Baruch et al., NeurIPS 2019, arXiv 1902.06156)."""

from __future__ import annotations

import torch

from fed_dpsat.client.attackers import Attack, Scene
from fed_dpsat.params import Params


class LittleIsEnough(Attack):
    """All attackers send their mean minus `z` standard deviations, within the spread of all (Baruch et al. 2019).

    The paper computes the largest z that a majority supports from the numbers of clients. For two or three attackers of
    ten it is below 0.2, so z is a parameter here, with the 1.5 of the paper's code. A single attacker has a standard
    deviation of 0, so it is honest.
    """

    def __init__(self, z: float = 1.5) -> None:
        self.z = z

    def forge(self, scene: Scene) -> Params:
        honest = scene.colluders()
        stacked = {name: torch.stack([update[name] for update in honest]) for name in scene.update}
        return {name: s.mean(0) - self.z * s.std(0, correction=0) for name, s in stacked.items()}


ATTACKS = {"little-is-enough": LittleIsEnough}
