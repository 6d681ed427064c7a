"""Clients one after the other in this process: the reference, and what scripts and tests use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fed_dpsat.flower.grid import answer, node_context


class InProcessBackend:
    """Runs ``client_app`` here; each node's context lives in a dictionary."""

    def __init__(self, client_app: ClientApp, run_config: Mapping[str, Any], num_nodes: int) -> None:
        self._client_app = client_app
        self._run_config = run_config
        self._num_nodes = num_nodes
        self._contexts: dict[int, Context] = {}

    def run(self, messages: Sequence[Message]) -> Iterator[Message]:
        """One reply per message, in their order."""
        for message in messages:
            node = message.metadata.dst_node_id
            if node not in self._contexts:
                self._contexts[node] = node_context(node, self._run_config, self._num_nodes)
            yield answer(self._client_app, message, self._contexts[node])

    def close(self) -> None:
        """Forget the contexts."""
        self._contexts.clear()
