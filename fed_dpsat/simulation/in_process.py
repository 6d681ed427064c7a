"""Clients one after the other in this process: the reference, used by scripts and tests."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.clientapp import ClientApp

from fed_dpsat.flower.grid import Answers, unanswered
from fed_dpsat.flower.wire import compat
from fed_dpsat.simulation.faults import Faults
from fed_dpsat.simulation.host import Host
from fed_dpsat.simulation.state import StateStore


class InProcessBackend:
    """Runs ``client_app`` here. States go into ``state_folder``, if given; ``kept`` names the states at the start."""

    def __init__(
        self,
        client_app: ClientApp,
        run_config: Mapping[str, Any],
        num_nodes: int,
        *,
        state_folder: Path | None = None,
        kept: Mapping[int, int] | None = None,
        faults: Faults | None = None,
    ) -> None:
        self._host = Host(client_app, run_config, num_nodes, StateStore(state_folder), faults)
        self._kept = dict(kept or {})

    def run(
        self, messages: Sequence[Message], *, release_counts: bool | None, timeout: float | None
    ) -> Iterator[Answers]:
        """As ``Backend.run``; a timeout does not interrupt a stack."""
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        for start in range(0, len(messages), self._host.stack_clients):
            stack = messages[start : start + self._host.stack_clients]
            if time.monotonic() > deadline:
                late = f"not started within reply_timeout={timeout:g} s"
                yield unanswered(stack, late, compat.ErrorCode.CLIENT_APP_CRASHED, summed=release_counts is not None)
                continue
            answers = self._host.answers(stack, self._kept, start=start, release_counts=release_counts)
            self._kept |= answers.kept
            yield answers

    def close(self) -> None:
        """No resources to free."""
