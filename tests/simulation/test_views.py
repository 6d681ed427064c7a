"""Runs whose steps train on random views of each image."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.errors import SettingError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate

CONFIG = RunConfig(
    noise_multiplier=2.0,
    delta=1e-4,
    seed=1,
    num_clients=3,
    num_rounds=2,
    augmentations=3,
    augmentation="crop",
    sample_rate=0.1,
)


def test_views_change_the_model_and_not_its_cost(tmp_path):
    plain = dataclasses.replace(CONFIG, augmentations=0, augmentation="crop-flip")
    runs = [simulate(config, out=tmp_path / str(i)) for i, config in enumerate((plain, CONFIG))]
    models = [torch.load(run.path / "checkpoint" / "model.pt", weights_only=True)["params"] for run in runs]
    assert runs[0].summary["epsilon"] == runs[1].summary["epsilon"]
    assert not torch.equal(models[0]["1.weight"], models[1]["1.weight"])


def test_numbers_have_no_views():
    table = Examples(inputs=torch.randn(30, 4), labels=torch.arange(30) % 2, mean=(0.0,) * 4, std=(1.0,) * 4)
    data = Dataset(name="table", train=table, test=table, class_names=("a", "b"))
    with pytest.raises(SettingError, match=r"augmentations=3.*examples \[4\]"):
        simulate(CONFIG, dataset=data)
