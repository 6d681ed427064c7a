"""Private heads on Ray workers: the same heads, model and figures as in one process."""

from __future__ import annotations

import dataclasses

import torch

from fed_dpsat.config import RunConfig
from fed_dpsat.simulation import simulate

CONFIG = RunConfig(
    noise_multiplier=1.0,
    delta=1e-4,
    model="mlp",
    personal_layers="head",
    partition="shards",
    num_clients=4,
    clients_per_round=3,
    num_rounds=3,
)


def test_the_same_on_ray(tmp_path, ray_cluster, same_bits):
    simulate(CONFIG, tmp_path / "here")
    simulate(dataclasses.replace(CONFIG, workers=2), tmp_path / "there")
    here, there = (
        torch.load(tmp_path / name / "checkpoint" / "model.pt", weights_only=True)["params"]
        for name in ("here", "there")
    )
    assert same_bits(here, there)
    lines = [(tmp_path / name / "rounds.jsonl").read_text() for name in ("here", "there")]
    assert lines[0] == lines[1]
    assert "personal_worst_decile" in lines[0]
