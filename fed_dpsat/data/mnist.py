"""MNIST: Y. LeCun et al., "Gradient-Based Learning Applied to Document Recognition", 1998."""

from __future__ import annotations

from fed_dpsat.data.dataset import Dataset
from fed_dpsat.data.sources import ImageSource, load

IDX_FILES = tuple(f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
SOURCE = ImageSource(
    name="mnist",
    class_names=tuple("0123456789"),
    shape=(1, 28, 28),
    mean=(0.1307,),
    std=(0.3081,),
    hub_repo="ylecun/mnist",
    torchvision_class="MNIST",
    torchvision_files=tuple(f"MNIST/raw/{file}" for file in IDX_FILES),
)


def mnist(data_source: str, data_path: str, cache_dir: str) -> Dataset:
    """MNIST: 60,000 + 10,000 grey handwritten digits, 28x28, 10 classes."""
    return load(SOURCE, data_source, data_path, cache_dir)


DATASETS = {"mnist": mnist}
