import numpy as np
import scipy.io

from fed_dpsat.data._torchvision import torchvision_datasets
from fed_dpsat.data.svhn import SOURCE, svhn


def test_parquet_holds_what_was_written(tmp_path, write_parquet, assert_holds):
    arrays = write_parquet(SOURCE, tmp_path / "d" / "cropped_digits")
    dataset = svhn("parquet", str(tmp_path / "d"), str(tmp_path / "cache"))
    assert_holds(dataset, arrays)
    assert dataset.input_shape == (3, 32, 32)
    assert dataset.num_classes == 10


def test_torchvision_reads_matlab_files_where_the_digit_0_is_called_10(
    tmp_path, random_arrays, assert_holds, monkeypatch
):
    arrays, files = random_arrays(SOURCE), {}
    arrays["train_labels"][0] = 0
    for split in ("train", "test"):
        labels = arrays[f"{split}_labels"]
        scipy.io.savemat(
            tmp_path / f"{split}_32x32.mat",
            {"X": arrays[f"{split}_inputs"].transpose(2, 3, 1, 0), "y": np.where(labels == 0, 10, labels)[:, None]},
        )
        files[split] = ["", f"{split}_32x32.mat", None]
    monkeypatch.setattr(torchvision_datasets().SVHN, "split_list", files)
    assert_holds(svhn("torchvision", str(tmp_path), str(tmp_path / "cache")), arrays)
