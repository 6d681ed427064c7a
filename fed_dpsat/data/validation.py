"""Examples that no client trains on: a validation split of the run, and held-out examples of each client."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

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


def hold_out_of_each(
    partitions: Sequence[np.ndarray], share: float, generator: np.random.Generator, total: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """By client, the examples that it trains on, and those that it holds out: each example by a coin of its place.

    The coin of an example depends on its place among the ``total`` training examples and on nothing else, so one
    example more or less, with the others in their places, changes one of the two parts. ``DataError`` for a client that
    keeps nothing to train on.
    """
    if not share:
        return list(partitions), [part[:0] for part in partitions]
    held = generator.random(total) < share
    for client, part in enumerate(partitions):
        if held[part].all():
            raise DataError(
                f"holdout_share={share:g} leaves client {client}, with {len(part)} examples, nothing to train on; "
                "lower it, or num_clients, or change the seed"
            )
    return [part[~held[part]] for part in partitions], [part[held[part]] for part in partitions]
