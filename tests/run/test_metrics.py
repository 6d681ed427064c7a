"""Metrics are served on the loopback interface, only if the library is there and the port is free."""

from __future__ import annotations

import sys
from contextlib import closing
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from fed_dpsat.device.node import free_port
from fed_dpsat.errors import SettingError
from fed_dpsat.plugins import PluginError
from fed_dpsat.run.metrics import Metrics


def test_without_the_library_the_error_has_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(PluginError, match=r"metrics_port=9464 needs a package .*pip install 'fed-dpsat\[operate\]'"):
        Metrics(9464)


def test_what_is_declared_is_served_until_the_end_and_nothing_else():
    pytest.importorskip("prometheus_client", reason="the extra 'operate' is not installed")
    port = free_port()
    with closing(Metrics(port)) as metrics:
        metrics.gauge("fed_dpsat_a", "A.").set(2)
        metrics.counter("fed_dpsat_b_total", "B.", ("of",)).labels("x").inc()
        text = urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        assert [line for line in text.splitlines() if not line.startswith("#")] == [
            "fed_dpsat_a 2.0",
            'fed_dpsat_b_total{of="x"} 1.0',
        ]
        with pytest.raises(SettingError, match=f"metrics_port={port} is not a port that is free on 127.0.0.1"):
            Metrics(port)
    with pytest.raises(URLError):
        urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)
