"""Fashion-MNIST: H. Xiao et al., "Fashion-MNIST: a Novel Image Dataset", arXiv:1708.07747, 2017."""

from __future__ import annotations

from fed_dpsat.data.dataset import Dataset
from fed_dpsat.data.mnist import IDX_FILES
from fed_dpsat.data.sources import ImageSource, load

SOURCE = ImageSource(
    name="fashion_mnist",
    class_names=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    shape=(1, 28, 28),
    mean=(0.2860,),
    std=(0.3530,),
    hub_repo="zalando-datasets/fashion_mnist",
    torchvision_class="FashionMNIST",
    torchvision_files=tuple(f"FashionMNIST/raw/{file}" for file in IDX_FILES),
)


def fashion_mnist(data_source: str, data_path: str, cache_dir: str) -> Dataset:
    """Fashion-MNIST: 60,000 + 10,000 grey pictures of clothing, 28x28, 10 classes."""
    return load(SOURCE, data_source, data_path, cache_dir)


DATASETS = {"fashion_mnist": fashion_mnist}
