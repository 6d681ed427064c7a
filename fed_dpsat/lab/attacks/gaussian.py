"""Noise instead of an update (Blanchard et al., NeurIPS 2017, arXiv 1703.02757)."""

from __future__ import annotations

import torch

from fed_dpsat.client.attackers import Attack, Scene
from fed_dpsat.params import Params, global_norm


class Gaussian(Attack):
    """Sends Gaussian noise with `factor` times the norm of its honest update (Blanchard et al. 2017)."""

    def __init__(self, factor: float = 20.0) -> None:
        self.factor = factor

    def forge(self, scene: Scene) -> Params:
        number = sum(u.numel() for u in scene.update.values())
        std = self.factor * float(global_norm(scene.update)) / number**0.5
        return {
            name: torch.from_numpy(std * scene.generator.standard_normal(u.shape)).to(u)
            for name, u in scene.update.items()
        }


ATTACKS = {"gaussian": Gaussian}
