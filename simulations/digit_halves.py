"""The digits of scikit-learn in two halves: 0 to 4 as public data, 5 to 9 as private data."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.data.digits import digits


def low() -> Dataset:
    """Digits 0 to 4, as classes 0 to 4."""
    return _only("digits 0 to 4", range(5))


def high() -> Dataset:
    """Digits 5 to 9, as classes 0 to 4."""
    return _only("digits 5 to 9", range(5, 10))


def _only(name: str, classes: Sequence[int]) -> Dataset:
    whole = digits()

    def chosen(examples: Examples) -> Examples:
        rows = torch.isin(examples.labels, torch.tensor(classes))
        labels = examples.labels[rows] - classes[0]
        return Examples(inputs=examples.inputs[rows], labels=labels, mean=examples.mean, std=examples.std)

    names = tuple(whole.class_names[c] for c in classes)
    return Dataset(name=name, train=chosen(whole.train), test=chosen(whole.test), class_names=names)
