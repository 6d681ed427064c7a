"""The opposite of the honest update (Li et al., AAAI 2019, arXiv 1811.03761)."""

from __future__ import annotations

from fed_dpsat.client.attackers import Attack, Scene
from fed_dpsat.params import Params


class SignFlip(Attack):
    """Sends ``-strength`` times its honest update."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def forge(self, scene: Scene) -> Params:
        return {name: -self.strength * u for name, u in scene.update.items()}


def sign_flip(strength: float = 4.0) -> Attack:
    """Sends minus `strength` times the honest update (Li et al. 2019)."""
    return SignFlip(strength)


ATTACKS = {"sign-flip": sign_flip}
