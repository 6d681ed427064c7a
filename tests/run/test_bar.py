"""The bar of a notebook needs IPython's display alone, which a stand-in plays here; nothing shows in a pipe."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from fed_dpsat.run import bar
from fed_dpsat.run.bar import progress_bar
from fed_dpsat.run.metric import metrics_of

ACCURACY = metrics_of("classification")[0]
LINES = [{"round": i, "test_accuracy": None if i == 2 else i / 10, "epsilon": float(i)} for i in range(4)]


def text_of(shown):
    console = Console(width=120, force_terminal=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(shown)
    return captured.get().strip()


@pytest.fixture
def notebook(monkeypatch):
    """The texts that a cell has shown."""
    found = []
    update = SimpleNamespace(update=lambda shown: found.append(text_of(shown)))
    display = SimpleNamespace(display=lambda shown, display_id: (found.append(text_of(shown)), update)[1])
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    return found


def test_a_notebook_shows_one_bar_with_the_last_evaluation(notebook, monkeypatch, capsys):
    monkeypatch.setattr(bar, "SECONDS", 0.0)
    with progress_bar(3, ACCURACY) as show:
        for line in LINES:
            show(line)
    assert [text.split()[1] for text in notebook] == ["0/3", "0/3", "1/3", "2/3", "3/3", "3/3"]
    assert notebook[3].endswith("accuracy 10.0 %, epsilon 2.00")
    assert notebook[4].endswith("accuracy 30.0 %, epsilon 3.00")
    assert capsys.readouterr() == ("", "")


def test_many_rounds_are_few_messages_and_the_last_state_comes_after_a_failure_too(notebook):
    def interrupted():
        with progress_bar(1000, ACCURACY) as show:
            for round in range(500):
                show({"round": round, "test_accuracy": 0.5, "epsilon": 1.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(notebook) < 100
    assert notebook[-1].split()[1] == "499/1000"


def test_a_terminal_shows_a_bar_on_stderr(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar(3, ACCURACY) as show:
        show(LINES[1])
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "epsilon 1.00" in shown.err


def test_nothing_shows_elsewhere(capsys):
    with progress_bar(3, ACCURACY) as show:
        show(LINES[1])
    assert capsys.readouterr() == ("", "")


def test_without_noise_epsilon_is_infinite(notebook):
    with progress_bar(3, ACCURACY) as show:
        show({"round": 3, "test_accuracy": "undefined", "epsilon": float("inf")})
    assert notebook[-1].endswith("accuracy undefined, epsilon inf")
