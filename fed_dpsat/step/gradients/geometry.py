"""The sizes that make a convolution what it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What a convolution is, but for its batch: sizes per dimension, ``shape`` that of the weight."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the kernel."""
        return self.shape[2:]

    @property
    def depthwise(self) -> bool:
        """Whether every channel has one filter of its own."""
        return self.groups == self.shape[0] and self.shape[1] == 1 and self.groups > 1

    @property
    def compiles(self) -> bool:
        """Whether ``kernels_source`` has it."""
        return len(self.kernel) == 2 and (self.groups == 1 or self.depthwise)

    def positions(self, sides: tuple[int, ...]) -> tuple[int, ...]:
        """Sides of the output, for an input with these sides."""
        return tuple(
            (side + 2 * p - d * (k - 1) - 1) // s + 1
            for side, p, d, k, s in zip(sides, self.padding, self.dilation, self.kernel, self.stride, strict=True)
        )
