"""``python -m benchmarks.live``: the most bytes of tensors that a step has alive at a time, beside those before it.

A count of what torch's operations make, the same on every run: no allocator and no other process is in it, and neither
is what kernels use inside. ``--against`` takes the contestants of ``benchmarks.step``.
"""

from __future__ import annotations

import argparse
import gc
import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.contestants import Step, contestants, problem


class Live(TorchDispatchMode):
    """``peak`` is the most bytes alive at a time of storages that operations within it made."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in gc.get_objects() if isinstance(t, Tensor)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The answer of torch, counted."""
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (storage := t.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_of(step: Step) -> float:
    """In MB, of the second of two steps."""
    step()
    gc.collect()
    with Live() as live:
        step()
    return live.peak / 2**20


def main() -> None:
    """Print a line for each contestant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="minilm-lora")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--against", default="inference,zeroth-order,nonprivate,dp-sgd")
    args = parser.parse_args()
    made = problem(args.model, args.batch, args.length)
    for name, step in contestants(args.against.split(","), made, args.batch).items():
        print(f"{args.model}, batch {args.batch}, {name}: {peak_of(step):.1f} MB of tensors")


if __name__ == "__main__":
    main()
