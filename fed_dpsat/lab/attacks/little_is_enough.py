"""A shift that hides among honest clients (Baruch et al., NeurIPS 2019, arXiv 1902.06156)."""

from __future__ import annotations

import torch

from fed_dpsat.client.attackers import Attack, Scene
from fed_dpsat.params import Params


class LittleIsEnough(Attack):
    """All attackers send the same: the mean of their honest updates less ``z`` standard deviations, per coordinate.

    The paper finds the largest z that a majority supports from the numbers of clients. That is below 0.2 for two or
    three of ten, so z is a parameter, and 1.5 as in its code. An attacker who is alone has no deviation to
    hide in: it is honest.
    """

    def __init__(self, z: float) -> None:
        self.z = z

    def forge(self, scene: Scene) -> Params:
        honest = scene.colluders()
        stacked = {name: torch.stack([update[name] for update in honest]) for name in scene.update}
        return {name: s.mean(0) - self.z * s.std(0, correction=0) for name, s in stacked.items()}


def little_is_enough(z: float = 1.5) -> Attack:
    """All send the attackers' mean less `z` standard deviations, within the spread of all (Baruch et al. 2019)."""
    return LittleIsEnough(z)


ATTACKS = {"little-is-enough": little_is_enough}
