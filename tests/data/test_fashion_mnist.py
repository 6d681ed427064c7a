import gzip
from pathlib import Path

import pytest

from fed_dpsat.data.fashion_mnist import SOURCE, fashion_mnist

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # apt-get install dataset-fashion-mnist


def test_parquet_and_torchvision_hold_what_was_written(tmp_path, write_parquet, write_idx, assert_holds):
    arrays = write_parquet(SOURCE, tmp_path / "parquet")
    dataset = fashion_mnist("parquet", str(tmp_path / "parquet"), str(tmp_path / "cache"))
    assert_holds(dataset, arrays)
    assert dataset.input_shape == (1, 28, 28)
    assert dataset.num_classes == 10
    arrays = write_idx(SOURCE, tmp_path / "torchvision")
    assert_holds(fashion_mnist("torchvision", str(tmp_path / "torchvision"), str(tmp_path / "cache")), arrays)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason=f"no {DEBIAN}; apt-get install dataset-fashion-mnist")
def test_the_real_images_are_all_there(tmp_path):
    for name in SOURCE.torchvision_files:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.decompress((DEBIAN / f"{file.name}.gz").read_bytes()))
    dataset = fashion_mnist("torchvision", str(tmp_path), str(tmp_path / "cache"))
    assert dataset.train.labels.bincount().tolist() == [6_000] * 10
    assert dataset.test.labels.bincount().tolist() == [1_000] * 10
    assert float(dataset.train.inputs.float().mean()) / 255 == pytest.approx(SOURCE.mean[0], abs=1e-3)
