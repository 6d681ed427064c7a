"""CIFAR-10: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009."""

from __future__ import annotations

from fed_dpsat.data.dataset import Dataset
from fed_dpsat.data.sources import ImageSource, load

SOURCE = ImageSource(
    name="cifar10",
    class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    shape=(3, 32, 32),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    hub_repo="uoft-cs/cifar10",
    image_column="img",
    torchvision_class="CIFAR10",
    torchvision_files=tuple(
        f"cifar-10-batches-py/{file}"
        for file in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
    ),
)


def cifar10(data_source: str, data_path: str, cache_dir: str) -> Dataset:
    """CIFAR-10: 50,000 + 10,000 colour photographs, 32x32, 10 classes."""
    return load(SOURCE, data_source, data_path, cache_dir)


DATASETS = {"cifar10": cifar10}
