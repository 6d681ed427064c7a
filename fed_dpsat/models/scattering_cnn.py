"""Small networks on scattering features: F. Tramer and D. Boneh, arXiv:2011.11660 (ICLR 2021), tables 8 and 9."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fed_dpsat.models._shapes import image_shape


def scattering_cnn_fashion_mnist(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two tanh convolutions and two linear layers on features: 33,066 parameters at 81x7x7 and 10 classes.

    ``x[B, C, H, W] -> logits[B, num_classes]``: 3x3 convolutions to 16 channels with stride 2 and to 32, a linear layer
    to 32, all tanh, and a linear layer.
    """
    channels, height, width = image_shape("scattering-cnn-fashion-mnist", input_shape, min_side=2)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(32 * ((height + 1) // 2) * ((width + 1) // 2), 32),
        nn.Tanh(),
        nn.Linear(32, num_classes),
    )


def scattering_cnn_cifar10(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two tanh convolutions and a linear layer on features: 187,210 parameters at 243x8x8 and 10 classes.

    ``x[B, C, H, W] -> logits[B, num_classes]``: 3x3 convolutions to 64 channels, both tanh, with 2x2 max pooling after
    the first, and a linear layer.
    """
    channels, height, width = image_shape("scattering-cnn-cifar10", input_shape, min_side=2)
    return nn.Sequential(
        nn.Conv2d(channels, 64, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(64 * (height // 2) * (width // 2), num_classes),
    )


MODELS: dict[str, Callable[..., nn.Module]] = {
    "scattering-cnn-fashion-mnist": scattering_cnn_fashion_mnist,
    "scattering-cnn-cifar10": scattering_cnn_cifar10,
}
