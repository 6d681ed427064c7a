"""Handwritten digits of 8x8 pixels from scikit-learn: real data without a download."""

from __future__ import annotations

import functools
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import torch

from fed_dpsat.data.dataset import Dataset, Examples

# Statistics of all 1,797 public images. A constant computed from the training split of a run would be a release of
# private data without a charge.
MEAN, STD = (0.3053,), (0.3761,)
FILE = "sklearn/datasets/data/digits.csv.gz"
"""Where ``sklearn.datasets.load_digits`` reads them, in 1.6 to 1.9: 64 levels and a class in each line."""


def digits() -> Dataset:
    """Digits of scikit-learn: 1,437 + 360 grey images, 8x8, 10 classes, no download.

    Pixels are float32 ``[N, 1, 8, 8]``, levels 0..16 scaled to 0..1. The split is fixed and stratified: the images are
    in a fixed random order within each class, and every fifth is a test image.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits" (test part), UCI Machine
    Learning Repository, 1998.
    """
    images, labels = _read()
    inputs = torch.from_numpy(images.astype(np.float32) / 16).view(-1, 1, 8, 8)
    order = np.random.RandomState(0).permutation(len(labels))  # NumPy has frozen this stream
    order = order[np.argsort(labels[order], kind="stable")]
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[order[::5]] = True

    def examples(chosen: np.ndarray) -> Examples:
        return Examples(
            inputs=inputs[torch.from_numpy(chosen)],
            mean=MEAN,
            std=STD,
            labels=torch.from_numpy(labels[chosen].astype(np.int64)),
        )

    return Dataset(name="digits", train=examples(~is_test), test=examples(is_test), class_names=tuple("0123456789"))


@functools.cache
def _read() -> tuple[np.ndarray, np.ndarray]:
    """Read the text file once per process, without the import of scikit-learn; callers copy the arrays."""
    rows = np.loadtxt(Path(str(distribution("scikit-learn").locate_file(FILE))), delimiter=",")
    return rows[:, :-1], rows[:, -1].astype(int)


DATASETS = {"digits": digits}
