"""Seconds go to the innermost phase, and a trace can be read by what shows traces."""

from __future__ import annotations

import json

from fed_dpsat.run import timing
from fed_dpsat.run.timing import Phases


def test_each_moment_counts_once_for_the_innermost_phase(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    phases = Phases()
    with phases("aggregate"):
        for _ in phases.waiting_for("train", [1, 2]):
            pass
    taken = phases.take()
    assert taken.keys() == {"aggregate", "train"}
    with phases("send"):
        pass
    again = phases.take()
    assert again.keys() == {"send"}
    assert 0 < taken["train"] + taken["aggregate"] + again["send"] < float(next(clock))


def test_an_exception_ends_a_phase():
    phases = Phases()
    try:
        with phases("train"):
            raise ValueError
    except ValueError:
        pass
    phases.take()
    with phases("evaluate"):
        pass
    assert phases.take().keys() == {"evaluate"}


def test_a_trace_names_rows_and_holds_every_stretch(tmp_path):
    phases = Phases(trace=True)
    with phases("train"):
        phases.add_span("client 3", 2, started=10.0, seconds=0.5)
    phases.write_trace(tmp_path / "trace.json", ["server", "clients, here", "worker 1"])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["server", "clients, here", "worker 1"]
    spans = {e["name"]: (e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"}
    assert spans["client 3"] == (2, 10e6, 0.5e6)
    assert spans.keys() == {"client 3", "train"}
