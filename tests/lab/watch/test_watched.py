"""A run with its view: nothing tears it, and what it is drawn on decides what is shown."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.logging import RichHandler

from fed_dpsat.lab.watch import watched
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate

CONFIG = RunConfig(num_rounds=3, num_clients=4, noise_multiplier=2.0, delta=1e-4, dropout_rate=0.4, seed=1)
CURSOR_UP = "\x1b[1A"


@pytest.fixture
def root(monkeypatch):
    """The root logger with just the handler that the command line gives it."""

    def use(console):
        handler = RichHandler(console=console, show_time=False, show_path=False, show_level=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
        monkeypatch.setattr(logging.getLogger(), "handlers", [handler])

    return use


def watch(tmp_path, root, *, terminal, quiet=False):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80, height=30, color_system=None)
    root(console)
    with watched(CONFIG, name="mine", folder=Path("runs/mine"), console=console, quiet=quiet) as show:
        simulate(CONFIG, tmp_path / "run", on_round=show)
    return console.file.getvalue()


def test_on_a_terminal_warnings_are_in_the_view_and_whole_below_it(tmp_path, root):
    text = watch(tmp_path, root, terminal=True)
    below = text.rpartition("\x1b[?25h")[2].splitlines()  # where the cursor is shown again
    last = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", text.rpartition("\x1b[?25h")[0].rpartition(CURSOR_UP)[2])
    assert "round     3/3" in last
    assert "warnings" in last
    assert len(below) >= 3
    assert all("dropped out (simulated)" in line or "more warnings like these" in line for line in below)
    for frame in text.rpartition("\x1b[?25h")[0].split(CURSOR_UP):
        assert "dropped out" not in frame.partition("mine: dp-sat")[0], "a warning was printed over the view"


def test_without_a_terminal_it_is_a_line_per_round_with_warnings_between(tmp_path, root):
    text = watch(tmp_path, root, terminal=False)
    rounds = [line for line in text.splitlines() if line.startswith("round") and "epsilon" in line]
    assert [line.split()[1] for line in rounds] == ["0/3", "1/3", "2/3", "3/3"]
    assert "dropped out (simulated)" in text
    assert "\x1b" not in text


def test_quiet_says_nothing_of_rounds(tmp_path, root):
    assert "epsilon" not in watch(tmp_path, root, terminal=True, quiet=True)


def test_a_run_that_is_resumed_shows_its_earlier_rounds(root):
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=30, color_system=None)
    root(console)
    earlier = [
        {"round": i, "test_accuracy": 0.5, "test_loss": 1.0, "epsilon": "inf", "asked": [], "accepted": 0,
         "dropped": {}, "retired": {}} for i in range(3)
    ]  # fmt: skip
    with watched(CONFIG, name="mine", folder=Path("runs/mine"), console=console, earlier=earlier):
        pass
    assert "round     2/3" in console.file.getvalue()
    assert "accuracy  50.0%" in console.file.getvalue()
