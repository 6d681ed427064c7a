"""The statistics, one class for each: what a client adds up, with a norm of at most 1 per unit, and what is read of it.

============ ========== ================================================================ ====================
line         numbers    what one row adds, u in [-1, 1] its clipped value                largest norm
============ ========== ================================================================ ====================
``Moments``  3          (u, u^2 - 1/2) / s and 0; or (0, 0, 1) without a value           1, s = sqrt(5) / 2
``Quantile`` bins       1 in the bin of its value; nothing without a value               1
``Labels``   classes    1 for its class; of several classes each 1 / sqrt(classes)       1
``Sizes``    16         a client adds 1 in the bin of its number of rows                 1, of a client
``Count``    1          a client adds its weight                                         1, of a client
============ ========== ================================================================ ====================

For ``Moments``: u^2 + (u^2 - 1/2)^2 = u^4 + 1/4 is at most 5/4. Without the 1/2 the bound would be sqrt(2).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fed_dpsat.client.totals import Floats
from fed_dpsat.statistics.rows import Declared, Rows

SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""The quantiles that are read."""
SIZE_BINS = 16
"""Bin b has the clients of 2^b to 2^(b + 1) - 1 rows, the last also those of more."""
LEAST_SHARE = 3.0
"""A count below so many deviations of its noise has no mean."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A released number and the standard deviation that the noise gives it."""

    value: float
    noise: float


@dataclass(frozen=True, kw_only=True)
class Totals:
    """The noised sum ``total[d]`` of a line, the deviation of its ``noise``, and the noised weight of all rows.

    ``count_noise`` is 0 if the number of rows is public. All of it is released, so what is computed from it is free.
    """

    total: Floats
    noise: float
    count: float
    count_noise: float

    def share(self, value: float) -> Reading:
        """``value`` of the count."""
        found = value / self.count
        return Reading(value=found, noise=math.hypot(self.noise, found * self.count_noise) / abs(self.count))


class Line(ABC):
    """One statistic."""

    name: str
    of_clients = False
    """Whether a client adds something of itself, and not of each of its rows."""

    @abstractmethod
    def sums(self, rows: Rows) -> Floats:
        """``[num_clients, d]``: what each client adds; one row more or less changes its norm by at most 1."""

    @abstractmethod
    def read(self, totals: Totals) -> Mapping[str, Reading]:
        """The statistics by name; empty if there is more noise than data."""


@dataclass(frozen=True, kw_only=True)
class Moments(Line):
    """Mean and standard deviation of the clipped values of a column, and the share of rows without a value."""

    column: Declared
    scale = math.sqrt(5) / 2

    @property
    def name(self) -> str:  # type: ignore[override]
        """The words for a user."""
        return f"moments of {self.column.name}"

    def sums(self, rows: Rows) -> Floats:
        """As ``Line``."""
        values = rows.values[self.column.name]
        missing = np.isnan(values)
        u = unit_interval(np.where(missing, self.column.low, values), self.column)
        pair = np.stack([u, u * u - 0.5], axis=1) / self.scale
        return rows.sums(np.concatenate([np.where(missing[:, None], 0.0, pair), missing[:, None]], axis=1))

    def read(self, totals: Totals) -> Mapping[str, Reading]:
        """As ``Line``: the errors are those of first order."""
        first, second, missing = totals.total.tolist()
        found = {"missing": totals.share(missing)}
        there, there_noise = totals.count - missing, math.hypot(totals.noise, totals.count_noise)
        if there < LEAST_SHARE * there_noise:
            return found
        mean, square = self.scale * first / there, self.scale * second / there
        mean_noise, square_noise = (
            math.hypot(self.scale * totals.noise, one * there_noise) / there for one in (mean, square)
        )
        half, middle = (self.column.high - self.column.low) / 2, (self.column.high + self.column.low) / 2
        bounded = min(1.0, max(-1.0, mean))
        found["mean"] = Reading(value=middle + half * bounded, noise=half * mean_noise)
        if (variance := square + 0.5 - mean * mean) > 0:
            std = min(1.0, math.sqrt(variance))
            noise = math.hypot(square_noise, 2 * mean * mean_noise) / (2 * std)
            found["std"] = Reading(value=half * std, noise=half * noise)
        return found


@dataclass(frozen=True, kw_only=True)
class Quantiles(Line):
    """Quantiles of a column from noised counts in ``bins`` equal bins of its range."""

    column: Declared
    bins: int

    @property
    def name(self) -> str:  # type: ignore[override]
        """The words for a user."""
        return f"quantiles of {self.column.name}"

    def sums(self, rows: Rows) -> Floats:
        """As ``Line``."""
        values = rows.values[self.column.name]
        there = ~np.isnan(values)
        u = unit_interval(np.where(there, values, self.column.low), self.column)
        places = np.minimum(((u + 1) / 2 * self.bins).astype(np.int64), self.bins - 1)
        return rows.counts(places, self.bins, there)

    def read(self, totals: Totals) -> Mapping[str, Reading]:
        """As ``Line``: the distribution is made monotone, so quantiles are in order."""
        from sklearn.isotonic import isotonic_regression  # type: ignore[import-untyped]

        whole = float(totals.total.sum())
        if whole < LEAST_SHARE * totals.noise * math.sqrt(self.bins):
            return {}
        below = isotonic_regression(np.cumsum(totals.total)[:-1] / whole, y_min=0.0, y_max=1.0)
        below = np.concatenate([[0.0], below, [1.0]])
        edges = np.linspace(self.column.low, self.column.high, self.bins + 1)
        edges = np.expm1(edges) if self.column.log else edges

        def at(share: float) -> float:
            place = int(np.searchsorted(below, share, side="left"))  # the first edge with so much below it
            low, high = below[max(place - 1, 0)], below[place]
            part = 1.0 if high == low else (share - low) / (high - low)
            return float(edges[max(place - 1, 0)] + part * (edges[place] - edges[max(place - 1, 0)]))

        found = {}
        for share in SHARES:
            bins = share * self.bins
            spread = totals.noise / whole * math.sqrt(bins * (1 - share) ** 2 + (self.bins - bins) * share**2)
            low, high = at(max(0.0, share - spread)), at(min(1.0, share + spread))
            found[f"{share:.0%}"] = Reading(value=at(share), noise=(high - low) / 2)
        return found


@dataclass(frozen=True, kw_only=True)
class Labels(Line):
    """The share of rows with each class."""

    class_names: tuple[str, ...]
    several: bool
    name: str = field(default="labels", init=False)

    @property
    def scale(self) -> float:
        """The largest norm of the classes of a row."""
        return math.sqrt(len(self.class_names)) if self.several else 1.0

    def sums(self, rows: Rows) -> Floats:
        """As ``Line``."""
        assert rows.labels is not None
        if self.several:
            return rows.sums(rows.labels / self.scale)
        return rows.counts(rows.labels.astype(np.int64), len(self.class_names), np.ones(len(rows.labels), dtype=bool))

    def read(self, totals: Totals) -> Mapping[str, Reading]:
        """As ``Line``; a share may be below 0 by its noise."""
        found = {}
        for name, value in zip(self.class_names, totals.total.tolist(), strict=True):
            of_one = totals.share(value)
            found[name] = Reading(value=self.scale * of_one.value, noise=self.scale * of_one.noise)
        return found


@dataclass(frozen=True, kw_only=True)
class Sizes(Line):
    """The share of clients by their number of rows; for the unit "client"."""

    num_clients: int
    name: str = field(default="sizes", init=False)
    of_clients = True

    def sums(self, rows: Rows) -> Floats:
        """As ``Line``, of one client more or less."""
        places = np.minimum(np.log2(np.maximum(rows.sizes, 1)).astype(np.int64), SIZE_BINS - 1)
        return np.eye(SIZE_BINS)[places]

    def read(self, totals: Totals) -> Mapping[str, Reading]:
        """As ``Line``; the number of clients is public."""
        names = [f"{2**b} to {2 ** (b + 1) - 1}" for b in range(SIZE_BINS - 1)] + [f"{2 ** (SIZE_BINS - 1)} or more"]
        n = self.num_clients
        return {
            name: Reading(value=value / n, noise=totals.noise / n)
            for name, value in zip(names, totals.total.tolist(), strict=True)
        }


@dataclass(frozen=True, kw_only=True)
class Count(Line):
    """The weight of all rows together; for the unit "client", where the number of rows is private."""

    name: str = field(default="count", init=False)

    def sums(self, rows: Rows) -> Floats:
        """As ``Line``."""
        return rows.sizes[:, None]

    def read(self, totals: Totals) -> Mapping[str, Reading]:
        """As ``Line``, in clients."""
        return {"weight of all clients": Reading(value=float(totals.total[0]), noise=totals.noise)}


def unit_interval(values: Floats, column: Declared) -> Floats:
    """``values[n]`` clipped to the range of ``column``, as numbers in [-1, 1]."""
    clipped: Floats = np.clip(values, column.low, column.high)
    return np.clip((clipped - column.low) / (column.high - column.low) * 2 - 1, -1.0, 1.0)
