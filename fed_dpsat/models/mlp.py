"""A perceptron with one hidden layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fed_dpsat.errors import ModelError
from fed_dpsat.models._shapes import vector_size


def mlp(input_shape: tuple[int, ...], num_classes: int, hidden: int = 128) -> nn.Module:
    """One hidden layer of 128 tanh units: 9,610 parameters at 64 features and 10 classes.

    ``x[B, *input_shape] -> logits[B, num_classes]``; torch's default initialisation. ``ModelError`` if
    ``hidden`` is below 1.
    """
    if hidden < 1:
        raise ModelError(f"model='mlp': hidden={hidden} is not at least 1; use 'linear' for no hidden layer")
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(vector_size("mlp", input_shape), hidden),
        nn.Tanh(),
        nn.Linear(hidden, num_classes),
    )


def mlp_small(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """As mlp with 32 hidden units: 2,410 parameters at 64 features and 10 classes, 25,450 at 784."""
    return mlp(input_shape, num_classes, hidden=32)


MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "mlp-small": mlp_small}
