"""Random views of an image: its gradient is the mean over several of them, clipped once (De et al. 2022, 2204.13650).

A view is moved by up to 4 pixels up or down and left or right, over edges that reflect, and may be mirrored. Which
views an example has follows from its own draws (``fed_dpsat.step.draws``), so no other example has a part in them, and
a sum over examples costs the privacy that it costs without views.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fed_dpsat.errors import SettingError
from fed_dpsat.step.bundles import Bundles, Part
from fed_dpsat.step.draws import VIEWS, Draws
from fed_dpsat.step.examples import Examples

AUGMENTATIONS = {"crop-flip": (4, True), "crop": (4, False), "flip": (0, True)}
"""By name, how many pixels a view moves at most, and whether half of the views are mirrored."""


@dataclass(frozen=True, kw_only=True)
class Views:
    """``count`` views of each example. Raises ``SettingError`` for an unknown ``augmentation`` or no view."""

    count: int
    augmentation: str = "crop-flip"

    def __post_init__(self) -> None:
        if self.augmentation not in AUGMENTATIONS:
            raise SettingError(
                "augmentation", self.augmentation, f"one of {', '.join(AUGMENTATIONS)}", "choose one of those"
            )
        if self.count < 1:
            raise SettingError("augmentations", self.count, "at least 1 view", "16 is the paper's")

    def check(self, shape: tuple[int, ...] | None) -> None:
        """Raise ``SettingError`` for examples of another ``shape`` than (C, H, W), or whose sides are too short."""
        least = AUGMENTATIONS[self.augmentation][0] + 1
        if shape is None or len(shape) != 3 or min(shape[1:]) < least:
            raise SettingError(
                "augmentations",
                self.count,
                f"possible with examples {'of several arrays' if shape is None else list(shape)}: views are of images "
                f"[C, H, W] with sides of {least} pixels or more",
                "set augmentations=0",
            )

    def parts(self, whole: Part, most_rows: int) -> Iterator[Part]:
        """The views of all of ``whole``, a few bundles at a time: ``most_rows`` views at most, or those of one."""
        weights, start = whole.weights / self.count, 0
        rows = weights.shape[1]
        step = max(1, most_rows // (rows * self.count)) * rows
        while True:
            few = whole.some(slice(start, start + step))
            (inputs, targets), draws = few.batch, self.draws(few.draws)
            of_views = weights[start // rows : (start + step) // rows].repeat_interleave(self.count, 1)
            yield Part((self.of(inputs, draws), targets.repeat_interleave(self.count, 0)), draws, Bundles(of_views))
            start += step
            if start >= len(whole.draws):
                return

    def draws(self, draws: Draws) -> Draws:
        """Those of the views of each example, one after the other."""
        ids = draws.ids.repeat(self.count) * self.count
        return draws.of(ids + np.tile(np.arange(self.count), len(draws)))

    def of(self, inputs: Examples, draws: Draws) -> Tensor:
        """``inputs[B, C, H, W]`` to ``[B * K, C, H, W]``; ``draws`` are those of the views; raises as ``check``."""
        self.check(tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else None)
        words = torch.from_numpy(draws.words(VIEWS, 3).astype(np.int64)).to(inputs.device)
        most, mirrors = AUGMENTATIONS[self.augmentation]
        down, right = (words[:, i, None] % (2 * most + 1) - most for i in (0, 1))
        rows, columns = (
            _reflected(torch.arange(side, device=inputs.device) + by, side)
            for side, by in zip(inputs.shape[2:], (down, right), strict=True)
        )
        if mirrors:
            columns = torch.where(words[:, 2, None] % 2 == 1, columns.flip(1), columns)
        of = torch.arange(len(inputs), device=inputs.device).repeat_interleave(self.count)
        moved: Tensor = inputs[of[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return moved.movedim(-1, 1).contiguous()


def _reflected(places: Tensor, side: int) -> Tensor:
    """``places`` in [0, side), mirrored at the first and the last pixel."""
    return side - 1 - (side - 1 - places.abs()).abs()
