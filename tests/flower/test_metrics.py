"""The metrics of a server are those of its run folder and its ledger."""

from __future__ import annotations

import dataclasses
import json
import logging
from statistics import median
from urllib.request import urlopen

import pytest

from fed_dpsat.accounting import PrivacyLedger
from fed_dpsat.device.node import free_port
from fed_dpsat.errors import SettingError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate

CONFIG = RunConfig(
    noise_multiplier=2.0,
    delta=1e-4,
    accountant="rdp",
    num_clients=5,
    clients_per_round=2,
    num_rounds=3,
    dropout_rate=0.4,
    seed=3,
)
EXPOSED = {
    "fed_dpsat_clients", "fed_dpsat_clients_connected", "fed_dpsat_clients_retired", "fed_dpsat_rounds_planned",
    "fed_dpsat_round", "fed_dpsat_round_end_timestamp_seconds", "fed_dpsat_round_seconds_total",
    "fed_dpsat_rounds_total", "fed_dpsat_replies_total", "fed_dpsat_epsilon",
}  # fmt: skip
"""docs/operate.md lists them."""


def test_a_run_serves_its_rounds_its_clients_and_its_ledger(tmp_path):
    pytest.importorskip("prometheus_client", reason="the extra 'operate' is not installed")
    port, seen = free_port(), []

    def scrape(record):
        text = urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        seen.append({series: float(value) for series, _, value in lines})

    summary = simulate(dataclasses.replace(CONFIG, metrics_port=port), tmp_path / "run", on_round=scrape)
    last = seen[-1]
    assert {series.partition("{")[0] for series in last} == EXPOSED
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [one["fed_dpsat_round"] for one in seen] == [0, 1, 2, 3]
    assert last["fed_dpsat_rounds_total"] == 3
    accepted, absent = sum(line["accepted"] for line in lines), sum(len(line["dropped"]) for line in lines)
    assert last['fed_dpsat_replies_total{verdict="accepted"}'] == accepted
    assert last['fed_dpsat_replies_total{verdict="absent"}'] == absent > 0
    assert last['fed_dpsat_replies_total{verdict="invalid"}'] == 0
    with PrivacyLedger(tmp_path / "run" / "ledger.sqlite", readonly=True) as ledger:
        spent = ledger.epsilon_by_client(1e-4, "rdp")
    assert last['fed_dpsat_epsilon{over_clients="max"}'] == pytest.approx(summary["epsilon"])
    assert last['fed_dpsat_epsilon{over_clients="median"}'] == pytest.approx(
        median(spent.get(client, 0.0) for client in range(5))
    )
    simulate(dataclasses.replace(CONFIG, metrics_port=port, num_rounds=1), tmp_path / "next")  # the port is free again


def test_a_port_that_is_taken_ends_a_run_before_it_has_a_folder(tmp_path):
    pytest.importorskip("prometheus_client", reason="the extra 'operate' is not installed")
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingError, match=f"metrics_port={port} is not a port that is free"):
            simulate(dataclasses.replace(CONFIG, metrics_port=port), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_log_of_a_run_is_json_if_asked(tmp_path, capsys):
    kept = {
        name: (logging.getLogger(name).handlers, logging.getLogger(name).propagate) for name in ("fed_dpsat", "flwr")
    }
    try:
        simulate(dataclasses.replace(CONFIG, log_format="json"), tmp_path / "run")
    finally:
        for name, (handlers, propagate) in kept.items():
            log = logging.getLogger(name)
            log.handlers, log.propagate = handlers, propagate
            log.setLevel(logging.NOTSET if name == "fed_dpsat" else logging.DEBUG)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    rounds = [line for line in lines if line["message"].startswith("round ") and "timing" in line]
    assert [line["round"] for line in rounds] == [0, 1, 2, 3]
    assert rounds[-1]["epsilon"] > 0
