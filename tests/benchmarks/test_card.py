"""The script for a card says why it does not run without one; its checks notice what is wrong. Times are not tested."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benchmarks import card, contestants
from fed_dpsat.errors import warn_once
from fed_dpsat.step.gradients.per_example import ENGINES
from fed_dpsat.step.gradients.planned import NoMemory, planned_sum
from fed_dpsat.step.placement import CPU

NO_CARD = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card on this machine")


@pytest.mark.slow
@NO_CARD
def test_without_a_card_it_ends_with_the_reason():
    done = subprocess.run([sys.executable, "-m", "benchmarks.card"], cwd=card.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("skipped: torch ")
    assert "sees no card on this machine" in done.stdout


def test_all_checks_take_less_than_ten_minutes():
    assert sum(seconds for seconds, _ in card.CHECKS.values()) < 600


def test_the_oracle_is_that_of_the_engines():
    said = card.oracle(CPU, ("lstm", "gru"), 2)
    assert [line.split()[:3] for line in said.split(", ")] == [
        ["lstm", "planned", "float32"],
        ["lstm", "vmap", "float32"],
        ["gru", "planned", "float32"],
        ["gru", "vmap", "float32"],
        ["gru", "planned", "bfloat16"],
    ]


def test_the_oracle_notices_a_wrong_sum(monkeypatch):
    right = card.private_step
    monkeypatch.setattr(card, "private_step", lambda *args: {name: 1.01 * g for name, g in right(*args).items()})
    with pytest.raises(card.Failed, match="above"):
        card.oracle(CPU, ("lstm",), 2)


def test_steps_take_turns():
    said = card.against_compiled(contestants.problem("gru", 2, 3), CPU, compiled=False, repeats=1)
    assert "of the compiled plain step (target 1.3)" in said


@NO_CARD
def test_a_step_that_does_not_fit_ends_or_gives_the_sum(monkeypatch):
    """The card is pretended: its memory holds two examples."""
    right = card.private_step

    def step(made, physical):
        if physical > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(made, physical=physical)

    made = contestants.problem("gru", 4, 3)
    for name in ("memory_allocated", "empty_cache", "set_per_process_memory_fraction"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("P", (), {"total_memory": 1}))
    monkeypatch.setattr(card, "peak_mb", lambda step, device: 1.0)
    monkeypatch.setattr(card, "private_step", step)
    with pytest.raises(card.Failed, match="do not fit, and the step ends"):
        card.out_of_memory(CPU, lambda device: made, small=2)
    monkeypatch.setattr(card, "private_step", lambda made, physical: step(made, min(physical, 2)))
    with pytest.raises(card.Failed, match="was not made smaller"):
        card.out_of_memory(CPU, lambda device: made, small=2)
    monkeypatch.setattr(card, "private_step", right)

    def little(loss_fn, at, inputs, targets, clipping, bundles):
        if len(targets) > 2:
            raise NoMemory
        return planned_sum(loss_fn, at, inputs, targets, clipping, bundles)

    monkeypatch.setitem(ENGINES, "auto", little)
    warn_once.cache_clear()
    assert "no memory for 4 per-example gradients" in card.out_of_memory(CPU, lambda device: made, small=2)


@pytest.mark.slow
def test_stacked_clients_end_with_the_model_of_single_ones():
    assert "stack_clients=4" in card.stacked(CPU, (1, 4))


def test_a_check_that_does_not_hold_fails(monkeypatch, capsys):
    def fails(device):
        raise card.Failed("it is off")

    def skips(device):
        raise card.Skipped("nothing there")

    monkeypatch.setattr(card, "CHECKS", {"fails": (1, fails), "skips": (1, skips), "holds": (1, lambda device: "good")})
    assert [card.check(name, CPU) for name in card.CHECKS] == [1, card.SKIPPED, 0]
    assert capsys.readouterr().out.split("\n") == ["it is off", "nothing there", "good", ""]
