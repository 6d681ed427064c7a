"""The one door to torchvision's data sets, which are slow to import."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np

from fed_dpsat.errors import DataError
from fed_dpsat.imports import repair_torchvision


def torchvision_datasets() -> ModuleType:
    """``torchvision.datasets``, with or without torchvision's compiled extension (``fed_dpsat.imports``)."""
    repair_torchvision()
    try:
        import torchvision.datasets  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise DataError(f"torchvision cannot be imported ({error}); pip install torchvision") from error
    module: ModuleType = torchvision.datasets
    return module


def read_split(class_name: str, root: Path, *, train: bool, download: bool) -> tuple[np.ndarray, np.ndarray]:
    """``(inputs[N, C, H, W] uint8, labels[N] int64)`` of one split of ``torchvision.datasets.<class_name>``.

    Raises ``DataError`` with torchvision's own words if the files are missing, altered or not to be fetched.
    """
    which = {"split": "train" if train else "test"} if class_name == "SVHN" else {"train": train}
    dataset_class = getattr(torchvision_datasets(), class_name)
    try:
        split = dataset_class(str(root), download=download, **which)
    except Exception as error:  # torchvision lets through what urllib, pickle, tarfile and torch raise
        raise DataError(
            f"data_path={str(root)!r}: torchvision cannot {'fetch' if download else 'read'} "
            f"{class_name} ({error}); delete damaged files there and "
            f"--set data_source=download"
        ) from error
    inputs = np.asarray(split.data)
    if inputs.ndim == 3:  # MNIST and its kin: [N, H, W]
        inputs = inputs[:, None]
    elif class_name.startswith("CIFAR"):  # [N, H, W, C]; SVHN is [N, C, H, W] already
        inputs = inputs.transpose(0, 3, 1, 2)
    return inputs, np.asarray(split.labels if class_name == "SVHN" else split.targets, dtype=np.int64)
