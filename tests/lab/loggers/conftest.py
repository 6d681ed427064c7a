"""A short run with a logger that keeps what it is told, written as a plug-in file."""

from __future__ import annotations

import sys

import pytest

from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate

SPY = '''
calls = []


class Spy:
    def begin(self, config, folder, next_round):
        calls.append(("begin", config, folder, next_round))

    def round(self, record):
        calls.append(("round", record))

    def end(self, summary):
        calls.append(("end", summary))


def spy():
    """Keeps what it is told."""
    return Spy()


class BreaksAtBegin(Spy):
    def begin(self, config, folder, next_round):
        raise OSError("no such server")


class BreaksAtRound(Spy):
    def round(self, record):
        super().round(dict(record))
        record.clear()  # its own copy: the next logger does not see that
        raise OSError("the disk is full")


class StopsAtRound(Spy):
    def round(self, record):
        super().round(record)
        raise KeyboardInterrupt


class BreaksAtEnd(Spy):
    def end(self, summary):
        super().end(summary)
        raise OSError("no such server")
'''


@pytest.fixture
def settings():
    return {
        "num_rounds": 3, "num_clients": 4, "noise_multiplier": 2.0, "delta": 1e-4, "dropout_rate": 0.3, "seed": 1,
        "release_counts": True, "evaluate_every": 2,
    }  # fmt: skip


@pytest.fixture
def spy(tmp_path, monkeypatch):
    """Name of the plug-in file; ``spy.calls()`` after a run is what it was told."""
    path = tmp_path / "spy_file.py"
    path.write_text(SPY)

    class Named(str):
        def calls(self):
            return sys.modules["fed_dpsat_plugin_spy_file"].calls

    return Named(path)


@pytest.fixture
def run(tmp_path, settings):
    """Trains with ``loggers`` in a new folder; returns it."""

    def train(loggers, **changes):
        folder = tmp_path / "run"
        simulate(RunConfig.from_mapping({**settings, "loggers": loggers, **changes}), folder)
        return folder

    return train
