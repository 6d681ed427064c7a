"""Contestants take turns: a process runs one round on command, so the load of the machine affects all equally.

A contestant writes ``@turn`` after its setup and after each round, and then waits for a line. The measuring process
takes the time from that line to the next ``@turn``, and reads the memory of the contestant from outside. This module
uses only the standard library, because contestants with another Python import it too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Turn = Callable[[], None]
"""What a contestant calls when it is set up, and after each round."""

SIGN = "@turn"
LAST_LINES = 12
CLOCK_OF_PROCESS = 2
"""With the number of a process, the clock of Linux for its processor time (``clock_getcpuclockid`` of glibc)."""
END_SECONDS = 60.0


def turn_from_stdin() -> Turn:
    """For a contestant: report that it is ready and wait for a command; its other output goes to stderr."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def turn() -> None:
        print(SIGN, file=channel, flush=True)
        if not sys.stdin.readline():
            raise SystemExit("nobody waits for another round")

    return turn


class ContestantError(RuntimeError):
    """A contestant ended before its last round; the text is the end of its stderr."""


class Contestant:
    """A process that takes turns; ``start_seconds`` is the time of its setup."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], timeout: float) -> None:
        self._timeout = timeout
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in end()
        started = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **env},
            text=True,
            start_new_session=True,
        )
        self._wait()
        self.start_seconds = time.perf_counter() - started

    def round(self) -> float:
        """Seconds of one round."""
        assert self._process.stdin
        started = time.perf_counter()
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._wait()
        return time.perf_counter() - started

    def memory_mb(self, key: str) -> float:
        """``VmRSS``, the current resident set, or ``VmHWM``, its peak, both with shared pages."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

    def cpu_seconds(self) -> float:
        """Processor time of the process without its children; other load hardly changes it."""
        return time.clock_gettime(~self._process.pid << 3 | CLOCK_OF_PROCESS)

    def end(self) -> None:
        """Wait for the end of the process group, and kill it if it does not end."""
        assert self._process.stdin
        try:
            self._process.stdin.close()
            self._process.wait(END_SECONDS)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._kill()
        self._errors.close()

    def _wait(self) -> None:
        assert self._process.stdout
        watchdog = threading.Timer(self._timeout, self._kill)
        watchdog.start()
        try:
            for line in self._process.stdout:
                if line.strip() == SIGN:
                    return
        finally:
            watchdog.cancel()
        self._process.wait()
        self._errors.seek(0)
        last = "".join(self._errors.readlines()[-LAST_LINES:])
        raise ContestantError(f"it ended with {self._process.returncode} (timeout {self._timeout:g} s): {last}")

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
