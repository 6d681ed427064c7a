"""The round benchmark measures what it says: the same arithmetic, and a row per contestant. Times are not tested."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import rounds
from benchmarks.rounds_contestants import Setting, idle_app, ours, training_config
from benchmarks.rounds_loop import loop
from benchmarks.turns import Contestant, ContestantError

KEYS = {"engine", "clients", "model_mb", "workers", "seconds_per_round", "ms_per_client", "parent_mb"}


class Turns:
    """Counts."""

    taken = 0

    def __call__(self) -> None:
        self.taken += 1


@pytest.mark.parametrize("private", [False, True])
def test_the_bare_loop_does_the_same_arithmetic_as_ours(private: bool) -> None:
    setting = Setting(clients=2, rounds=2, private=private)
    turns = Turns()
    a, b = ours(setting, turns), loop(training_config(setting), turns)
    assert turns.taken == 2 * (1 + setting.rounds)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0)


def test_the_loop_of_another_seed_is_another_model() -> None:
    import dataclasses

    config = training_config(Setting(clients=1, rounds=1))
    a, b = (loop(dataclasses.replace(config, seed=seed), Turns()) for seed in (0, 1))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) > 1e-3
