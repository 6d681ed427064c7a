"""Private heads, halves of strategies and whole clients as the unit on Ray workers: the bits of one process."""

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


HALVES = [
    dataclasses.replace(CONFIG, personal_layers="", strategy=strategy, momentum=0.5)
    for strategy in ("ditto", "mr-mtl", "dp-scaffold")
]


KINDS = {"private heads": CONFIG, "of whole clients too": OF_CLIENTS} | {half.strategy: half for half in HALVES}


@pytest.mark.slow
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
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
    assert ("personal_worst_decile" in lines[0]) == (config.strategy != "dp-scaffold")
