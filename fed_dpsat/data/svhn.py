"""SVHN: Y. Netzer et al., "Reading Digits in Natural Images with Unsupervised Feature Learning", 2011."""

from __future__ import annotations

from fed_dpsat.data.dataset import Dataset
from fed_dpsat.data.sources import ImageSource, load

SOURCE = ImageSource(
    name="svhn",
    class_names=tuple("0123456789"),
    shape=(3, 32, 32),
    mean=(0.4377, 0.4438, 0.4728),
    std=(0.1980, 0.2010, 0.1970),
    hub_repo="ufldl-stanford/svhn",
    hub_config="cropped_digits",
    torchvision_class="SVHN",
    torchvision_files=("train_32x32.mat", "test_32x32.mat"),
)


def svhn(data_source: str, data_path: str, cache_dir: str) -> Dataset:
    """SVHN: 73,257 + 26,032 colour pictures of house numbers, cropped to one digit, 32x32, 10 classes."""
    return load(SOURCE, data_source, data_path, cache_dir)


DATASETS = {"svhn": svhn}
