"""Prometheus metrics behind one setting, ``metrics_port``, on the loopback interface: only this machine reads them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fed_dpsat.errors import SettingError
from fed_dpsat.plugins import PluginError

HOST = "127.0.0.1"


@dataclass(frozen=True)
class _Collector:
    collect: Callable[[], Iterator[Any]]
    """``prometheus_client`` calls it at each scrape."""


class Metrics:
    """Gauges and counters of one process, served at ``http://127.0.0.1:port/metrics`` until ``close``.

    The registry is its own: what a caller does not declare is not served. Raises ``PluginError`` without the library,
    and ``SettingError`` for a port that is taken.
    """

    def __init__(self, port: int) -> None:
        try:
            self._library: Any = importlib.import_module("prometheus_client")
            importlib.import_module("prometheus_client.core")
        except ImportError as error:
            raise PluginError(
                f"metrics_port={port} needs a package that is not installed ({error}); pip install 'fed-dpsat[operate]'"
            ) from None
        self._library.disable_created_metrics()
        self.registry = self._library.CollectorRegistry()
        try:
            self._server, self._thread = self._library.start_http_server(port, addr=HOST, registry=self.registry)
        except OSError as error:
            bound = f"a port that is free on {HOST} ({error.strerror})"
            raise SettingError("metrics_port", port, bound, "choose another, or 0 for no metrics") from None

    def gauge(self, name: str, doc: str, labels: Sequence[str] = ()) -> Any:
        """A gauge of ``prometheus_client``."""
        return self._library.Gauge(name, doc, labels, registry=self.registry)

    def counter(self, name: str, doc: str, labels: Sequence[str] = ()) -> Any:
        """A counter of ``prometheus_client``, whose name ends with ``_total``."""
        return self._library.Counter(name, doc, labels, registry=self.registry)

    def at_scrape(self, docs: Mapping[str, str], read: Callable[[], Sequence[float]]) -> None:
        """Gauges with these names and ``docs``, whose values ``read`` returns in this order at each scrape.

        After an exception of ``read`` a scrape has the status 500.
        """

        def families() -> Iterator[Any]:
            for (name, doc), value in zip(docs.items(), read(), strict=True):
                yield self._library.core.GaugeMetricFamily(name, doc, value)

        self.registry.register(_Collector(families))

    def close(self) -> None:
        """Serve no longer."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
