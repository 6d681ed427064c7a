"""A ``vmap`` level of our own: within it each operation sees one example, whatever batch is behind it.

``vmap`` cannot mix examples: an operation on a batched tensor is applied row by row; a number that is read off one, a
branch on one, a write of one into another tensor and a draw from torch's generators raise ``RuntimeError``. The level
is opened by hand, not by ``torch.func.vmap``, for two reasons: a layer that keeps rows apart may look below it, at the
whole batch, and it costs a tenth around a small model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch._C import _functorch as functorch

RANDOMNESS = "error"
"""What ``vmap`` does with a draw from torch's generators."""


class Level:
    """The level of one pass over ``batch`` examples."""

    def __init__(self, batch: int) -> None:
        self.batch, self._number = batch, -1

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Within it ``wrap`` makes batched tensors; afterwards torch refuses them."""
        self._number = functorch._vmap_increment_nesting(self.batch, RANDOMNESS)
        try:
            yield
        finally:
            functorch._vmap_decrement_nesting()

    def wrap(self, whole: Tensor) -> Tensor:
        """``whole[B, *shape]`` as one ``[*shape]`` for each example; raises ``RuntimeError`` for another ``B``."""
        if len(whole) != self.batch:
            raise RuntimeError(f"{len(whole)} rows for {self.batch} examples")
        one: Tensor = functorch._add_batch_dim(whole, 0, self._number)
        return one

    def wraps(self, t: Tensor) -> bool:
        """Whether ``t`` is one tensor for each example of this level."""
        return bool(functorch.is_batchedtensor(t)) and bool(functorch.maybe_get_level(t) == self._number)

    def whole(self, t: Tensor) -> Tensor:
        """``[B, *shape]`` of ``t[*shape]``; one that all examples share is expanded."""
        if not self.wraps(t):
            return t.expand(self.batch, *t.shape)
        inner, dimension = functorch._unwrap_batched(t, self._number)
        whole: Tensor = inner.movedim(dimension, 0) if dimension else inner
        return whole

    def on_top(self) -> bool:
        """Whether no other transform of ``torch.func`` was opened within this one."""
        return bool(functorch.maybe_current_level() == self._number)

    @contextmanager
    def below(self) -> Iterator[None]:
        """Within it torch computes on whole batches; only what keeps rows apart may run there."""
        above: list[Any] = []
        while (number := functorch.maybe_current_level()) is not None and number >= self._number:
            above.append(functorch.pop_dynamic_layer_stack())
        try:
            yield
        finally:
            while above:
                functorch.push_dynamic_layer_stack(above.pop())


def is_transformed(t: Tensor) -> bool:
    """Whether a transform of ``torch.func`` stands behind ``t``."""
    return bool(functorch.is_functorch_wrapped_tensor(t))
