"""Plain CNNs, small enough that noise in every parameter does not drown them."""

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
    """Three tanh convolutions with GroupNorm and average pooling, one linear layer: 33,834 parameters at 3x32x32.

    ``x[B, C, H, W] -> logits[B, num_classes]``. For each width: a 3x3 convolution, GroupNorm without affine
    parameters, tanh, 2x2 pooling; so sides are halved ``len(widths)`` times, rounding down. torch's default
    initialisation. ``ModelError`` if a width is not a multiple of the 8 groups.
    """
    return _small("tanh-cnn-small", input_shape, num_classes, widths, nn.Tanh, nn.AvgPool2d)


def selu_cnn_small(input_shape: tuple[int, ...], num_classes: int, widths: Sequence[int] = SMALL_WIDTHS) -> nn.Module:
    """As tanh-cnn-small with SELU and max pooling, which learns faster in few private steps: 33,834 parameters."""
    return _small("selu-cnn-small", input_shape, num_classes, widths, nn.SELU, nn.MaxPool2d)


def _small(
    name: str,
    input_shape: tuple[int, ...],
    num_classes: int,
    widths: Sequence[int],
    activation: type[nn.Module],
    pool: Callable[[int], nn.Module],
) -> nn.Module:
    if not widths or any(width < 1 or width % GROUPS for width in widths):
        raise ModelError(
            f"model={name!r}: widths={tuple(widths)} are not multiples of {GROUPS}, the "
            f"number of groups; use for instance {SMALL_WIDTHS}"
        )
    shrink = 2 ** len(widths)
    channels, height, width = image_shape(name, input_shape, min_side=shrink)
    layers: list[nn.Module] = []
    for out_channels in widths:
        layers += [
            nn.Conv2d(channels, out_channels, 3, padding=1),
            nn.GroupNorm(GROUPS, out_channels, affine=False),
            activation(),
            pool(2),
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


MODELS: dict[str, Callable[..., nn.Module]] = {
    "tanh-cnn-small": tanh_cnn_small,
    "selu-cnn-small": selu_cnn_small,
    "tanh-cnn": tanh_cnn,
}
