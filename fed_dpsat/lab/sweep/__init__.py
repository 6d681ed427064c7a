"""Grids of runs: tuned on validation examples, run on many seeds, gone on with after a kill, one tidy table."""

from __future__ import annotations

from fed_dpsat.lab.sweep.run import Event, Swept, run_sweep

__all__ = ["Event", "Swept", "run_sweep"]
