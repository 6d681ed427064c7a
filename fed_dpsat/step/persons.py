"""Persons with several examples: which of them a step takes, as bundles that are bounded together.

A person joins a batch by one coin, and then gives up to ``most`` of their examples. Their gradients are averaged, or
summed, and clipped once: one Poisson-subsampled mechanism over persons (Charles et al. 2024, arXiv 2407.07737, as
user-level sampling). A person with more examples gives others in each step, drawn without replacement from their own
list by words that are a function of example and step (``fed_dpsat.step.draws``), so nobody else has a part in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fed_dpsat.errors import DataError, SettingError
from fed_dpsat.step.bundles import Bundles
from fed_dpsat.step.draws import CHOICE, Draws

GRADIENTS = ("mean", "sum")

Places = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Persons:
    """Those of a client: person ``p`` has the examples ``places[offsets[p]:offsets[p + 1]]``, places in its data.

    Raises ``SettingError`` for ``most`` below 1 or another ``gradient`` than ``mean`` and ``sum``, and ``DataError``
    for a person without an example, and for an example of nobody or of two persons.
    """

    offsets: Places
    places: Places
    most: int
    gradient: str = "mean"

    def __post_init__(self) -> None:
        if self.most < 1:
            raise SettingError("user_examples", self.most, "at least 1", "8 is a start")
        if self.gradient not in GRADIENTS:
            raise SettingError("user_gradient", self.gradient, f"one of {', '.join(GRADIENTS)}", "choose one of those")
        sizes, whole = np.diff(self.offsets), len(self.places)
        if not len(sizes) or self.offsets[0] or self.offsets[-1] != whole or sizes.min() < 1:
            raise DataError(f"{len(sizes)} persons, one of them without examples; leave such persons out")
        if not np.array_equal(np.bincount(self.places, minlength=whole), np.ones(whole, np.int64)):
            raise DataError(f"persons who do not divide {whole} examples; give each example one person")

    @classmethod
    def of(cls, users: NDArray[np.int64], *, most: int, gradient: str = "mean") -> Persons:
        """Those whose numbers are ``users[N]``, by example; in the order of the numbers."""
        order = np.argsort(users, kind="stable")
        begins = np.flatnonzero(np.diff(users[order], prepend=users[order[:1]] - 1))
        return cls(offsets=np.append(begins, len(users)), places=order, most=most, gradient=gradient)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def chosen(self, drawn: Tensor, draws: Callable[[Tensor], Draws]) -> Iterator[tuple[Tensor, Bundles]]:
        """Places ``[G * R]`` and their bundles, for the persons ``drawn[B]``; the same number of rows in each part.

        Persons of a part have at most R examples to give and more than R / 2, and are filled up with their last one at
        weight 0. ``draws`` makes those of places, in this step.
        """
        persons = drawn.cpu().numpy()
        given = np.minimum(self.offsets[persons + 1] - self.offsets[persons], self.most)
        widths = np.minimum(2 ** np.ceil(np.log2(given)).astype(np.int64), self.most)
        for width in np.unique(widths) if len(persons) else [1]:
            some = widths == width
            counts, among = given[some, None], np.arange(width)
            places = self._of_few(persons[some], np.minimum(among, counts - 1))
            if width == self.most:
                self._draw(persons[some], places, draws)
            weights = (among < counts) / (counts if self.gradient == "mean" else 1)
            yield torch.from_numpy(places.reshape(-1)), Bundles(torch.from_numpy(weights))

    def _of_few(self, persons: Places, which: Places) -> Places:
        """``[G, R]``, the places of the examples ``which[G, R]`` of their own lists."""
        found: Places = self.places[self.offsets[persons, None] + which]
        return found

    def _draw(self, persons: Places, places: Places, draws: Callable[[Tensor], Draws]) -> None:
        """Replace the rows of ``places[G, most]`` of persons with more examples by some that are drawn."""
        sizes = self.offsets[persons + 1] - self.offsets[persons]
        more = sizes > self.most
        sizes = sizes[more]
        owners = np.repeat(np.arange(len(sizes)), sizes)
        within = np.arange(len(owners)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        own = self.places[np.repeat(self.offsets[persons[more]], sizes) + within]
        words = draws(torch.from_numpy(own)).words(CHOICE, 1)[:, 0]
        drawn = own[np.lexsort((words, owners))][within < self.most]
        places[more] = drawn.reshape(-1, self.most)
