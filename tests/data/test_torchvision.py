import subprocess
import sys

import numpy as np
import pytest

from fed_dpsat.data import mnist
from fed_dpsat.data._torchvision import read_split, torchvision_datasets
from fed_dpsat.errors import DataError

NAMES = ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100", "SVHN")


@pytest.mark.slow
def test_data_sets_are_there_whether_or_not_torchvisions_extension_loads():
    code = (
        "from fed_dpsat.data._torchvision import torchvision_datasets; torchvision_datasets(); "
        f"import torchvision; print([getattr(torchvision.datasets, n).__name__ for n in {NAMES!r}])"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == str(list(NAMES)), result.stderr


@pytest.mark.slow
def test_it_works_after_somebody_elses_import_has_failed():
    code = (
        "try:\n    import torchvision\nexcept RuntimeError: pass\n"
        "from fed_dpsat.data._torchvision import torchvision_datasets\n"
        "assert torchvision_datasets() is torchvision_datasets(); print('fine')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "fine", result.stderr


def test_a_damaged_file_is_an_error_with_the_folder(tmp_path, write_idx):
    write_idx(mnist.SOURCE, tmp_path)
    (tmp_path / mnist.SOURCE.torchvision_files[0]).write_bytes(b"\0\0\x08\x03short")
    with pytest.raises(DataError, match=rf"data_path='{tmp_path}': torchvision cannot read MNIST"):
        read_split("MNIST", tmp_path, train=True, download=False)


def test_a_failed_download_is_an_error_with_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision_datasets().MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(DataError, match="torchvision cannot fetch MNIST"):
        read_split("MNIST", tmp_path, train=True, download=True)


def test_labels_are_int64_and_images_channels_first(tmp_path, write_idx):
    arrays = write_idx(mnist.SOURCE, tmp_path)
    inputs, labels = read_split("MNIST", tmp_path, train=False, download=False)
    np.testing.assert_array_equal(inputs, arrays["test_inputs"])
    assert labels.dtype == np.int64
