"""Grids of runs: tuned on validation examples, run on many seeds, resumed after a kill, with tables of results."""

from __future__ import annotations

from fed_dpsat.lab.sweep.run import Event, Swept, run_sweep

__all__ = ["Event", "Swept", "run_sweep"]
