"""Made-up examples of the form of a data set: what a run is tried on before any private example is touched."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fed_dpsat.data.dataset import INPUTS, Dataset, Examples, Leaf
from fed_dpsat.data.sequences import Sequences

SHORTEST = 8
"""Length of a made-up text, if ``max_length`` allows it; each is one shorter than the one before, and starts again."""


def made_up(dataset: Dataset, count: int, *, public: bool, rows: int = 4) -> Dataset:
    """``count`` training and ``rows`` test examples like those of ``dataset``, none of them a training example.

    If the test split is ``public``, inputs are rows of it. Labels run over all classes, from the largest down, and
    start again after ``rows`` examples.
    """
    shown = dataset.test if public and len(dataset.test) else None
    train, test = (
        made_up_examples(like, shown, number, dataset.num_classes, rows)
        for like, number in ((dataset.train, count), (dataset.test, rows))
    )
    return dataclasses.replace(dataset, train=train, test=test)


def made_up_examples(like: Examples, public: Examples | None, count: int, num_classes: int, rows: int = 4) -> Examples:
    """``count`` examples of the form of ``like``; inputs are rows of ``public``, or made up without it."""
    shown = {} if public is None else public.leaves
    leaves = {name: _inputs(leaf, shown.get(name), count) for name, leaf in like.leaves.items()}
    one = leaves[INPUTS] if isinstance(like.inputs, Tensor) else None
    return dataclasses.replace(
        like,
        inputs=one if isinstance(one, Tensor) else leaves,
        labels=_labels(like, leaves, count, num_classes, rows),
        columns={},
    )


def _inputs(like: Leaf, public: Leaf | None, count: int) -> Leaf:
    generator = torch.Generator().manual_seed(0)
    if isinstance(like, Sequences):
        if isinstance(public, Sequences):
            return public.rows(torch.arange(count) % len(public))
        longest = min(SHORTEST, like.max_length)
        lengths = longest - torch.arange(count) % longest
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        # the numbers 0 and 1 are tokens of any vocabulary of two
        values = torch.randint(min(2, like.vocabulary_size), (int(offsets[-1]),), generator=generator)
        return dataclasses.replace(like, values=values, offsets=offsets)
    shape = (count, *like.shape[1:])
    if isinstance(public, Tensor) and public.dtype == like.dtype:
        return public[torch.arange(count) % len(public)]
    if like.dtype == torch.uint8:
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    # a pixel, a feature and the number of a token or category may all be 0 or 1
    return torch.randint(2, shape, generator=generator).to(like.dtype)


def _labels(like: Examples, inputs: dict[str, Leaf], count: int, num_classes: int, rows: int) -> Leaf | None:
    labels, classes = like.labels, max(1, num_classes)
    place, group = torch.arange(count) % rows, torch.arange(count) // rows
    if labels is None:
        return None
    if isinstance(labels, Sequences):  # one for each position of the text
        text = next(leaf for leaf in inputs.values() if isinstance(leaf, Sequences))
        values = (classes - 1 - torch.arange(len(text.values))) % classes
        return dataclasses.replace(labels, values=values, offsets=text.offsets.clone())
    if labels.dtype == torch.int64:
        return (classes - 1 - place * (1 + group)) % classes
    alternating = (1 + place + group).view(-1, *[1] * (labels.ndim - 1)) % 2
    return alternating.expand(count, *labels.shape[1:]).to(labels.dtype).clone()
