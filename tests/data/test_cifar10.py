from pathlib import Path

import pytest
import torch

from fed_dpsat.data.cifar10 import SOURCE, cifar10

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10"


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    if not (REAL / "train-00000-of-00001.parquet").is_file():
        pytest.skip(f"no CIFAR-10 in {REAL}")
    return cifar10("parquet", str(REAL), str(tmp_path_factory.mktemp("cache")))


@pytest.mark.slow
def test_real_images_are_all_there(real):
    assert (len(real.train), len(real.test)) == (50_000, 10_000)
    assert real.input_shape == (3, 32, 32)
    assert real.train.labels.bincount().tolist() == [5_000] * 10
    assert real.test.labels.bincount().tolist() == [1_000] * 10


@pytest.mark.slow
def test_real_channel_statistics_are_those_of_the_readme(real):
    pixels = torch.cat([chunk.transpose(0, 1).flatten(1) for chunk in real.train.inputs.split(5_000)], dim=1)
    means = [float(channel.sum(dtype=torch.int64)) / channel.numel() / 255 for channel in pixels]
    assert means == pytest.approx([0.49125, 0.48209, 0.44652], abs=1e-5)
    rows, _ = real.train.batch(torch.arange(0, 50_000, 20))
    assert rows.mean((0, 2, 3)).abs().max() < 0.05
    assert (rows.std((0, 2, 3)) - 1).abs().max() < 0.05


def test_parquet_and_torchvision_hold_what_was_written(tmp_path, write_parquet, write_cifar, assert_holds):
    arrays = write_parquet(SOURCE, tmp_path / "parquet")
    assert_holds(cifar10("parquet", str(tmp_path / "parquet"), str(tmp_path / "cache")), arrays)
    arrays = write_cifar(SOURCE, tmp_path / "torchvision")
    assert_holds(cifar10("torchvision", str(tmp_path / "torchvision"), str(tmp_path / "cache")), arrays)
