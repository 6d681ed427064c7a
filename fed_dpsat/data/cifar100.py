"""CIFAR-100: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009."""

from __future__ import annotations

from fed_dpsat.data.dataset import Dataset
from fed_dpsat.data.sources import ImageSource, load

FINE_LABELS = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""

SOURCE = ImageSource(
    name="cifar100",
    class_names=tuple(FINE_LABELS.split()),
    shape=(3, 32, 32),
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    hub_repo="uoft-cs/cifar100",
    image_column="img",
    label_column="fine_label",
    torchvision_class="CIFAR100",
    torchvision_files=tuple(f"cifar-100-python/{file}" for file in ("train", "test", "meta")),
)


def cifar100(data_source: str, data_path: str, cache_dir: str) -> Dataset:
    """CIFAR-100: 50,000 + 10,000 colour photographs, 32x32, 100 classes (the fine labels)."""
    return load(SOURCE, data_source, data_path, cache_dir)


DATASETS = {"cifar100": cifar100}
