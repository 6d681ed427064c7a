"""A validation split for the choice of hyper-parameters, so that the test split stays unused until the end."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from fed_dpsat.data.dataset import Dataset
from fed_dpsat.errors import DataError


def hold_out(dataset: Dataset, share: float, seed: int) -> Dataset:
    """``dataset`` with ``round(share * N)`` of its ``N`` training examples, drawn by ``seed``, as its test split.

    The other examples stay in the training split, in their order. The old test split is not in the result.

    ==================================== ==============
    share of N rounds to nothing         ``DataError``
    share of N leaves nothing to train   ``DataError``
    ==================================== ==============
    """
    total = len(dataset.train)
    size = round(share * total)
    if not 0 < size < total:
        raise DataError(
            f"validation_share={share:g} of the {total} training examples of {dataset.name} is {size}, "
            f"not in [1, {total - 1}]; 0.1 is usual"
        )
    order = np.random.default_rng(seed).permutation(total)
    held, kept = np.sort(order[:size]), np.sort(order[size:])
    train, test = (dataset.train.rows(torch.from_numpy(rows)) for rows in (kept, held))
    return dataclasses.replace(dataset, train=train, test=test)
