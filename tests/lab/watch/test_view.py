"""What a terminal shows, recorded at fixed widths."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from fed_dpsat.lab.watch.held import HeldWarnings
from fed_dpsat.lab.watch.progress import Progress
from fed_dpsat.lab.watch.view import View, duration, round_line
from fed_dpsat.run.metric import LOSS, metric_named
from fed_dpsat.settings.config import RunConfig


def record(round, **changes):
    line = {
        "round": round, "test_accuracy": 0.1 * round, "test_loss": 2.5 - 0.25 * round, "epsilon": 0.4 * round,
        "asked": [0, 1, 2] if round else [], "accepted": 2 * bool(round), "dropped": {1: "late"} if round else {},
        "retired": {}, "timing": {
            "seconds": 2.0, "clients_per_second": 1.0, "examples_per_second": 64.0, "peak_memory_mb": 432.1,
            "phases": {"train": 1.5, "send": 0.25, "aggregate": 0.125, "evaluate": 0.1, "account": 0.01},
        },
    }  # fmt: skip
    return {**line, **changes}


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def shown(config, records, *, width, warnings=(), encoding="utf-8", metric=None):
    """The text of the view 1 s after the last record, each of which came after 2 s."""
    clock, held = Clock(), HeldWarnings()
    progress = Progress.of(config)
    progress.metric = metric or progress.metric
    view = View(title="mine: dp-sat", folder=Path("runs/mine"), progress=progress, held=held, clock=clock)
    for line in records:
        clock.now += 2.0
        view.add(line)
    clock.now += 1.0
    held.recent.extend(warnings)
    held.count = len(warnings)
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(record=True, width=width, file=stream, force_terminal=True, legacy_windows=False)
    console.print(view)
    return [line.rstrip() for line in console.export_text().splitlines()]


CONFIG = RunConfig(num_rounds=8, num_clients=3, target_epsilon=4.0)


def test_at_eighty_columns():
    lines = shown(CONFIG, [record(i) for i in range(5)], width=80, warnings=["round 4: client 1 dropped: late"])
    bars, texts = lines[1:5], lines[5:]
    assert lines[0] == "mine: dp-sat"
    assert bars == [
        "round     4/8      ━━━━━━━━━━━━━━━━╸━━━━━━━━━━━━━━━━ 11 s, 7 s left",
        "accuracy  40.0%    ▁▃▅▇█                             0.0% to 40.0%",
        "loss      1.500    █▇▅▃▁                             1.500 to 2.500",
        "epsilon   1.600    ━━━━━━━━━━━━━╺━━━━━━━━━━━━━━━━━━━ of 4 at delta 1e-05, PLD",
    ]
    assert texts == [
        "clients   3 asked, 2 accepted, 1 dropped; in all 12, 8, 4",
        "pace      1 clients/s, 64 examples/s, 432 MB without workers",
        "a round   2 s: send 0.25, train 1.5, aggregate 0.12, evaluate 0.1",
        "folder    runs/mine",
        "1 warning",
        "  round 4: client 1 dropped: late",
    ]


def test_a_narrow_terminal_has_the_bars_below_and_loses_nothing():
    wide = " ".join(shown(CONFIG, [record(i) for i in range(5)], width=80))
    narrow = shown(CONFIG, [record(i) for i in range(5)], width=40)
    assert max(len(line) for line in narrow) <= 40
    words = " ".join(narrow).split()
    assert [word for word in wide.split() if "━" not in word and word not in words] == []


@pytest.mark.parametrize("width", [20, 40, 69, 70, 120, 300])
def test_no_line_is_longer_than_the_terminal(width):
    config = RunConfig(num_rounds=1_000_000, target_epsilon=4.0)
    warnings = ["a warning that is longer than most terminals are wide " * 5] * 3
    lines = shown(config, [record(999_999)], width=width, warnings=warnings)
    assert max(len(line) for line in lines) <= width
    assert any("999999/1000000" in line for line in lines) or width < 40


def test_without_unicode():
    assert all(line.isascii() for line in shown(CONFIG, [record(i) for i in range(5)], width=80, encoding="ascii"))


def test_before_the_first_round():
    lines = shown(CONFIG, [], width=80)
    assert lines[-2:] == ["preparing", "folder    runs/mine"]
    assert "left" not in lines[1]


@pytest.mark.parametrize(
    ("config", "epsilon", "words"),
    [
        (RunConfig(num_rounds=8, noise_multiplier=1.0), 1.25, "1.250  no budget, at delta 1e-05, PLD"),
        (RunConfig(num_rounds=8, private=False), "inf", "inf  no noise, no guarantee"),
        (RunConfig(num_rounds=8, private=False), float("inf"), "inf  no noise, no guarantee"),
    ],
)
def test_epsilon_without_a_budget(config, epsilon, words):
    assert f"epsilon   {words}" in shown(config, [record(1, epsilon=epsilon)], width=80)


def test_rounds_that_were_not_evaluated_and_a_loss_that_is_none():
    lines = shown(CONFIG, [record(1, test_accuracy=None, test_loss=None)], width=80)
    assert not any(line.startswith(("accuracy", "loss")) for line in lines)
    lines = shown(CONFIG, [record(1, test_loss=float("nan"))], width=80)
    assert any(line.startswith("loss      nan") and line.endswith("nan to nan") for line in lines)


def test_clients_that_retired_are_counted():
    assert any("2 retired" in line for line in shown(CONFIG, [record(1, retired={0: 4.0, 2: 4.0})], width=80))


def test_a_round_in_one_line():
    progress = Progress.of(CONFIG).add(record(0, timing={}))
    assert round_line(progress) == "round 0/8  accuracy 0.0%  loss 2.500  epsilon 0.00"
    progress.add(record(1, test_accuracy=None, test_loss=None))
    assert round_line(progress) == "round 1/8  accuracy 0.0%  loss 2.500  epsilon 0.40  1 clients/s  14 s left"
    progress.add(record(8))
    assert round_line(progress).endswith("epsilon 3.20  1 clients/s")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (93_784, "26 h 3 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def of_metric(task, name, values, *, width=80):
    """The lines of the view of a run with the metric ``name`` of ``task``."""
    records = [record(i) | {f"test_{name}": value} for i, value in enumerate(values)]
    return shown(CONFIG, records, width=width, metric=metric_named(name, task))


def test_a_metric_has_its_name_its_unit_and_says_what_is_best():
    (_, _, error, loss, *_) = of_metric("regression", "rmse", (80.0, 60.0, 54.1234))
    assert error == "RMSE      54.12    █▂▁                               54.12 (best) to 80.00"
    assert loss.startswith("loss      2.000")
    (_, _, share, *_) = of_metric("causal-lm", "token_accuracy", (0.0, 0.25))
    assert share.startswith("token accuracy 25.0%")
    assert share.endswith("0.0% to 25.0%")


@pytest.mark.parametrize("width", [20, 40, 69, 70, 120])
@pytest.mark.parametrize("value", [1.234567e9, "undefined", float("inf")])
def test_long_names_and_values_fit(width, value):
    lines = of_metric("multilabel", "average_precision", (0.5, value), width=width)
    assert max(len(line) for line in lines) <= width
    lines = of_metric("causal-lm", "perplexity", (0.5, value), width=width)
    assert max(len(line) for line in lines) <= width
    assert "perplexity" in " ".join(lines)


def test_a_metric_that_is_undefined_is_not_0():
    lines = of_metric("multilabel", "auroc", ("undefined", "undefined"))
    assert lines[2].split()[:2] == ["AUROC", "undefined"]
    progress = Progress.of(CONFIG)
    progress.metric = metric_named("auroc", "multilabel")
    progress.add(record(1, test_auroc="undefined"))
    assert "AUROC undefined  loss 2.250" in round_line(progress)
    progress.add(record(2, test_auroc=0.75))
    assert "AUROC 75.0%  loss 2.000" in round_line(progress)


def test_a_metric_of_your_own_is_known_at_the_end_and_until_then_the_loss_is_shown():
    lines = shown(CONFIG, [record(1)], width=80, metric=LOSS)
    assert sum(line.startswith("loss") for line in lines) == 1
    assert not any("accuracy" in line for line in lines)
