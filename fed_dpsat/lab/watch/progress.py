"""The progress of a run, from the lines of its rounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from fed_dpsat import plugins
from fed_dpsat.accounting.plans import read_table
from fed_dpsat.run.metric import metric_of_settings, value_of
from fed_dpsat.run.numbers import with_noise
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.tasks.metric import UNDEFINED, Metric, Value

Record = Mapping[str, Any]


@dataclass(kw_only=True)
class Progress:
    """The rounds of a run so far, as ``OnRound`` receives them; ``budget`` is the largest budget of a client."""

    num_rounds: int
    budget: float
    delta: float
    accountant: str
    metric: Metric
    rounds: list[Record] = field(default_factory=list)

    @classmethod
    def of(cls, config: RunConfig, earlier: Iterable[Record] = ()) -> Progress:
        """The progress at the start of a run of ``config``, after the rounds ``earlier`` of a resumed run."""
        budgets = [row.target_epsilon or math.inf for row in read_table(config)]
        return cls(
            num_rounds=config.num_rounds,
            budget=max(budgets),
            delta=config.delta,
            accountant=config.accountant.upper(),
            metric=metric_of_settings(config.settings(), getattr(plugins.load("task", config.task), "metrics", ())),
            rounds=list(earlier),
        )

    def add(self, record: Record) -> Progress:
        """Add a round; a repeated round removes the old one and those after it."""
        if record["round"] <= self.done:
            self.rounds = [known for known in self.rounds if known["round"] < record["round"]]
        self.rounds.append(record)
        return self

    @property
    def last(self) -> Record | None:
        """The last round; None before the first evaluation."""
        return self.rounds[-1] if self.rounds else None

    @property
    def done(self) -> int:
        """The number of complete rounds."""
        return int(self.last["round"]) if self.last else 0

    def measured(self, name: str) -> list[float]:
        """``name`` of the evaluated rounds, in order, as numbers; NaN if it is undefined."""
        found = [record[name] for record in self.rounds if record[name] is not None]
        return [math.nan if value == UNDEFINED else float(value) for value in found]

    def latest(self, name: str) -> Value | None:
        """``name`` of the last evaluated round; None before it."""
        return next((value_of(record[name]) for record in reversed(self.rounds) if record[name] is not None), None)

    def with_noise(self, text: str, metric: Metric) -> str:
        """``text``, the latest value of ``metric``, with the interval of its noise if it has one."""
        last = next((record for record in reversed(self.rounds) if record[metric.key] is not None), {})
        return with_noise(text, metric, last)

    def total(self, name: str) -> int:
        """The number of clients under ``name`` over all rounds."""
        return sum(_count(record[name]) for record in self.rounds)

    def seconds_left(self, since_last: float) -> float | None:
        """The time of the remaining rounds at the mean pace, minus ``since_last``; None before a timed round."""
        timed = [record["timing"]["seconds"] for record in self.rounds if record["round"] and "timing" in record]
        if not timed:
            return None
        return max(0.0, (self.num_rounds - self.done) * fmean(timed) - since_last)


def _count(value: Any) -> int:
    return value if isinstance(value, int) else len(value)
