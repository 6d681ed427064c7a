"""Softmax regression."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fed_dpsat.models._shapes import vector_size


def linear(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Softmax regression, one linear layer: 650 parameters at 64 features and 10 classes.

    ``x[B, *input_shape] -> logits[B, num_classes]``; torch's default initialisation.
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(vector_size("linear", input_shape), num_classes))


MODELS: dict[str, Callable[..., nn.Module]] = {"linear": linear}
