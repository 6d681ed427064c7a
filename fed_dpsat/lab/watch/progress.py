"""What is known of a run from the lines of its rounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from fed_dpsat.accounting.plans import read_table
from fed_dpsat.settings.config import RunConfig

RECENT = 10
"""Rounds whose mean duration stands for those to come."""

Record = Mapping[str, Any]


@dataclass(kw_only=True)
class Progress:
    """Rounds of a run so far, each with the lines that ``OnRound`` gets; ``budget`` is the largest of a client."""

    num_rounds: int
    budget: float
    delta: float
    accountant: str
    rounds: list[Record] = field(default_factory=list)

    @classmethod
    def of(cls, config: RunConfig, earlier: Iterable[Record] = ()) -> Progress:
        """At the start of a run of ``config``, or after the rounds that are there of one that is resumed."""
        budgets = [row.target_epsilon or math.inf for row in read_table(config)]
        return cls(
            num_rounds=config.num_rounds,
            budget=max(budgets),
            delta=config.delta,
            accountant=config.accountant.upper(),
            rounds=list(earlier),
        )

    def add(self, record: Record) -> Progress:
        """With one more round, or one that was done again: those after it are not there any more."""
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
        """Rounds that are over."""
        return int(self.last["round"]) if self.last else 0

    def measured(self, name: str) -> list[float]:
        """``name`` of the rounds that were evaluated, in order; text such as "nan" is a number again."""
        return [float(record[name]) for record in self.rounds if record[name] is not None]

    def total(self, name: str) -> int:
        """Clients counted under ``name`` over all rounds."""
        return sum(_count(record[name]) for record in self.rounds)

    def seconds_left(self, since_last: float) -> float | None:
        """Remaining rounds at the pace of the last ones, less what has passed; None before one was timed."""
        timed = [record["timing"]["seconds"] for record in self.rounds if record["round"] and "timing" in record]
        if not timed:
            return None
        return max(0.0, (self.num_rounds - self.done) * fmean(timed) - since_last)


def _count(value: Any) -> int:
    return value if isinstance(value, int) else len(value)
