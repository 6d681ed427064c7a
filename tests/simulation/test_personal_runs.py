"""Private heads and whole clients as the unit on Ray workers: the same bits and figures as in one process."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fed_dpsat.settings.config import RunConfig
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
OF_CLIENTS = dataclasses.replace(
    CONFIG, privacy_unit="client", client_sampling="poisson", optimizer="dp-sgd", clip_norm=0.1, keep_share=0.5
)


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, OF_CLIENTS], ids=["private heads", "of whole clients too"])
def test_the_same_on_ray(config, tmp_path, ray_cluster, same_bits):
    simulate(config, tmp_path / "here")
    simulate(dataclasses.replace(config, workers=2), tmp_path / "there")
    here, there = (
        torch.load(tmp_path / name / "checkpoint" / "model.pt", weights_only=True)["params"]
        for name in ("here", "there")
    )
    assert same_bits(here, there)
    lines = [(tmp_path / name / "rounds.jsonl").read_text() for name in ("here", "there")]
    assert lines[0] == lines[1]
    assert "personal_worst_decile" in lines[0]
