"""A torchvision that was built for another torch can be imported: its missing operators are declared first.

PyPI's torchvision is linked against CUDA. Beside a CPU build of torch its extension does not load. torchvision accepts
that, but then registers shape functions for two operators that only the extension defines, and ``import torchvision``
ends in "operator torchvision::nms does not exist"; so does the import of timm, and of peft. Models and data sets call
neither operator, so their signatures, without an implementation, are enough. If the extension loads, nothing is done.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

REGISTRATIONS = "torchvision._meta_registrations"
"""The module that registers the shape functions. torchvision loads its extension before."""
OPERATORS = ("nms", "qnms")
"""What torchvision registers with or without its extension: 0.21 to 0.25 nms, 0.28 and 0.29 both."""

_declared: list[Any] = []  # a Library takes its operators with it when it is collected


class _BeforeTorchvision:
    """A finder of ``sys.meta_path`` that finds nothing: Python asks it before it runs ``REGISTRATIONS``."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if name == REGISTRATIONS:
            declare_operators()


def repair_torchvision() -> None:
    """From now on ``import torchvision`` works in this process with or without its extension; torch is not loaded."""
    if not any(finder is _BeforeTorchvision for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision)


def declare_operators() -> list[str]:
    """Declare those ``OPERATORS`` that are not there; return their names."""
    import torch

    missing = [name for name in OPERATORS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in missing:
            signature = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library.define(signature)  # type: ignore[no-untyped-call]
        _declared.append(library)
    return missing
