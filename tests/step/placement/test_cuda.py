"""Whole simulations with ``device=cuda``, where there is a card: the settings, the ledger, the bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fed_dpsat.run.folder import RunFolder
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no card on this machine")

DEVICE = "cuda"
CONFIG = RunConfig(
    model="tanh-cnn-small",
    optimizer="dp-sat",
    base_optimizer="adam",
    lr=0.01,
    num_clients=4,
    num_rounds=3,
    local_steps=2,
    noise_multiplier=1.0,
    sample_rate=0.2,
)


def run(folder, **settings):
    summary = simulate(dataclasses.replace(CONFIG, **settings), folder)
    return summary, RunFolder(folder, resume=True).load_checkpoint().params


def test_a_run_is_that_of_the_cpu_and_costs_the_same(tmp_path):
    here, wanted = run(tmp_path / "here")
    there, params = run(tmp_path / "there", device=DEVICE)
    assert there["epsilon"] == here["epsilon"]
    assert there["test_accuracy"] == pytest.approx(here["test_accuracy"], abs=0.02)
    for name, p in wanted.items():
        torch.testing.assert_close(params[name], p, rtol=1e-2, atol=1e-3)
    assert (tmp_path / "there" / "environment.json").read_text().count(f'"device": "{DEVICE}') == 1


def test_the_same_seed_gives_the_same_bits_again(tmp_path, same_bits):
    assert same_bits(*(run(tmp_path / name, device=DEVICE)[1] for name in ("once", "again")))


@pytest.mark.slow
def test_two_workers_share_the_card(tmp_path, same_bits):
    _, here = run(tmp_path / "here", device=DEVICE)
    _, there = run(tmp_path / "workers", device=DEVICE, workers=2, gpus_per_worker=0.5)
    assert same_bits(here, there)
