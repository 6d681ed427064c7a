"""Tanh CNNs: bounded activations keep gradients small, which clipping then leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from fed_dpsat.errors import ModelError
from fed_dpsat.models._shapes import image_shape

GROUPS = 8
SMALL_WIDTHS = (16, 32, 64)
PAPERNOT_WIDTHS = (32, 64, 128)
PAPERNOT_HIDDEN = 128


def tanh_cnn_small(input_shape: tuple[int, ...], num_classes: int, widths: Sequence[int] = SMALL_WIDTHS) -> nn.Module:
    """Three tanh convolutions with GroupNorm and one linear layer: 23,946 parameters at 1x8x8, 10 classes.

    ``x[B, C, H, W] -> logits[B, num_classes]``. For each width: a 3x3 convolution, GroupNorm without affine
    parameters, tanh, 2x2 average pooling; so sides are halved ``len(widths)`` times, rounding down. torch's
    default initialisation. ``ModelError`` if a width is not a multiple of the 8 groups.
    """
    if not widths or any(width < 1 or width % GROUPS for width in widths):
        raise ModelError(
            f"model='tanh-cnn-small': widths={tuple(widths)} are not multiples of {GROUPS}, the "
            f"number of groups; use for instance {SMALL_WIDTHS}"
        )
    shrink = 2 ** len(widths)
    channels, height, width = image_shape("tanh-cnn-small", input_shape, min_side=shrink)
    layers: list[nn.Module] = []
    for out_channels in widths:
        layers += [
            nn.Conv2d(channels, out_channels, 3, padding=1),
            nn.GroupNorm(GROUPS, out_channels, affine=False),
            nn.Tanh(),
            nn.AvgPool2d(2),
        ]
        channels = out_channels
    features = channels * (height // shrink) * (width // shrink)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, num_classes))


def tanh_cnn(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The tanh CNN of Papernot et al. (2020): 550,570 parameters at 3x32x32, 10 classes.

    ``x[B, C, H, W] -> logits[B, num_classes]``. Two 3x3 convolutions and 2x2 average pooling at 32, 64 and
    128 channels, a linear layer to 128, all tanh, then a linear layer; no normalisation. torch's default
    initialisation. Source: "Tempered Sigmoid Activations for Deep Learning with Differential Privacy".
    """
    shrink = 2 ** len(PAPERNOT_WIDTHS)
    channels, height, width = image_shape("tanh-cnn", input_shape, min_side=shrink)
    layers: list[nn.Module] = []
    for out_channels in PAPERNOT_WIDTHS:
        layers += [
            nn.Conv2d(channels, out_channels, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.Tanh(),
            nn.AvgPool2d(2),
        ]
        channels = out_channels
    features = channels * (height // shrink) * (width // shrink)
    return nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Linear(features, PAPERNOT_HIDDEN),
        nn.Tanh(),
        nn.Linear(PAPERNOT_HIDDEN, num_classes),
    )


MODELS: dict[str, Callable[..., nn.Module]] = {"tanh-cnn-small": tanh_cnn_small, "tanh-cnn": tanh_cnn}
