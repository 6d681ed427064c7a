"""What a factory checks of ``input_shape``, one example's shape, before it builds anything."""

from __future__ import annotations

import math

from fed_dpsat.errors import ModelError


def vector_size(model: str, input_shape: tuple[int, ...]) -> int:
    """Numbers in one example of any shape; ``ModelError`` where there are none: ``()``, ``(0,)``."""
    if not input_shape or min(input_shape) < 1:
        raise shape_error(
            model,
            input_shape,
            "one or more positive sizes",
            "one example's shape without the batch, for instance (64,) or (1, 8, 8)",
        )
    return math.prod(input_shape)


def image_shape(model: str, input_shape: tuple[int, ...], *, min_side: int) -> tuple[int, int, int]:
    """``(C, H, W)`` of one image; ``ModelError`` where it is no image or has a side below ``min_side``."""
    if len(input_shape) != 3 or input_shape[0] < 1 or min(input_shape[1:]) < min_side:
        raise shape_error(
            model,
            input_shape,
            f"(C, H, W) with H and W of at least {min_side}",
            "'mlp' or 'linear', which take any shape",
        )
    channels, height, width = input_shape
    return channels, height, width


def shape_error(model: str, input_shape: tuple[int, ...], wanted: str, instead: str) -> ModelError:
    """The error that every model raises: the model, the shape, what it wants and what to use instead."""
    return ModelError(f"model={model!r}: input_shape={input_shape} is not {wanted}; use {instead}")
