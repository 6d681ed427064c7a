"""Honest training on flipped labels (Tolpegin et al., ESORICS 2020, arXiv 2007.08432)."""

from __future__ import annotations

from torch import Tensor

from fed_dpsat.client.attackers import Attack


class LabelFlip(Attack):
    """Trains on flipped labels, the last class for the first and so on (Tolpegin et al. 2020)."""

    def poison(self, labels: Tensor, num_classes: int) -> Tensor:
        return num_classes - 1 - labels


ATTACKS = {"label-flip": LabelFlip}
