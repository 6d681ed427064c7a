"""The one door to torchvision, which is slow to import and does not import everywhere."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from fed_dpsat.data.dataset import DataError

_declared: list[torch.library.Library] = []  # a Library takes its operators with it when it is collected


def torchvision_datasets() -> ModuleType:
    """``torchvision.datasets``, also where torchvision's compiled extension cannot be loaded.

    PyPI's torchvision is linked against CUDA. Beside a CPU build of torch its extension does not load, which
    torchvision itself forgives, but then it registers shape functions for operators that only the extension
    would have defined, and ``import torchvision`` ends in "operator torchvision::nms does not exist". Data
    sets call no operator, so declaring the signatures, without an implementation, is enough.
    """
    try:
        import torchvision.datasets  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise DataError(f"torchvision cannot be imported ({error}); pip install torchvision") from error
    except RuntimeError as error:
        if _declared or "operator torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):  # those that torchvision 0.28 registers unconditionally
            signature = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library.define(signature)  # type: ignore[no-untyped-call]
        _declared.append(library)
        import torchvision.datasets
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
