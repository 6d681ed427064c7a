"""A metric and its values, without the code that computes them: for tasks, and for those who read what a run wrote."""

from __future__ import annotations

import re
from dataclasses import dataclass

UNDEFINED = "undefined"
"""The value of a metric that has none on a split: of one class, of one example, or of outputs that are not finite."""

PERCENT = "%"

Value = float | str
"""A number or ``UNDEFINED``."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number that says how good a model is; ``unit`` "%" is for a share in [0, 1], which readers see in percent."""

    name: str
    label: str
    higher_is_better: bool = True
    unit: str = ""

    @property
    def key(self) -> str:
        """Its key in ``summary.json`` and in the lines of ``rounds.jsonl``."""
        return f"test_{self.name}"

    @property
    def slug(self) -> str:
        """Its name in names of files and in ids of a page."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def title(self) -> str:
        """The label with a capital letter, for the start of a sentence."""
        return self.label[:1].upper() + self.label[1:]

    @property
    def directed(self) -> str:
        """The label and, if a smaller value is better, the direction: for a column whose cells have the unit."""
        return self.label if self.higher_is_better else f"{self.label} (lower is better)"

    @property
    def heading(self) -> str:
        """Label, unit and, if a smaller value is better, the direction: for a column without units and an axis."""
        remarks = [self.unit] if self.unit else []
        remarks += [] if self.higher_is_better else ["lower is better"]
        return self.label + (f" ({', '.join(remarks)})" if remarks else "")

    @property
    def scale(self) -> int:
        """The factor from a stored value to a value in ``unit``."""
        return 100 if self.unit == PERCENT else 1

    def goodness(self, value: float) -> float:
        """A number that grows as ``value`` gets better; the same function ranks means."""
        return value if self.higher_is_better else -value
