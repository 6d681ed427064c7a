"""Residual networks with GroupNorm in the place of BatchNorm.

All map ``x[B, C, H, W]`` to ``logits[B, num_classes]``, halve the sides where the width grows and end in the
mean over positions, so any image of the least side works.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fed_dpsat.models._shapes import image_shape


def resnet20_gn(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """ResNet-20 with GroupNorm(8) (He et al. 2016, CIFAR): 272,474 parameters at 3x32x32, 10 classes.

    Widths 16, 32, 64, three basic blocks each; 1x1 convolution and GroupNorm on a shortcut that changes
    shape (their option B). GroupNorm is affine. torch's default initialisation. Sides of at least 4.
    """
    channels, _, _ = image_shape("resnet20-gn", input_shape, min_side=4)
    return _resnet(channels, num_classes, widths=(16, 32, 64), blocks=3, groups=8)


def resnet10_gn(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """ResNet-10 with GroupNorm(32) of the DP-SAT code (Park et al. 2023): 4,902,090 at 1x28x28, 10 classes.

    Widths 64, 128, 256, 512, one basic block each, ReLU, affine GroupNorm: what that code's ``ResNet10`` is
    after Opacus has replaced its BatchNorm. torch's default initialisation. Sides of at least 8.
    """
    channels, _, _ = image_shape("resnet10-gn", input_shape, min_side=8)
    return _resnet(channels, num_classes, widths=(64, 128, 256, 512), blocks=1, groups=32)


def wrn16_4_gn(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """WRN-16-4, GroupNorm(16), standardised weights (De et al. 2022): 2,753,818 at 3x32x32, 10 classes.

    Widths 64, 128, 256 after a stem of 16, two blocks each. As in their code (jax_privacy), each convolution
    follows ReLU then affine GroupNorm, and has a bias and a gain. Weights start normal with variance
    1 / fan-in, biases at 0. Sides of at least 4.
    """
    channels, _, _ = image_shape("wrn16-4-gn", input_shape, min_side=4)
    layers: list[nn.Module] = [WSConv2d(channels, 16, 3)]
    channels = 16
    for stage, width in enumerate((64, 128, 256)):
        layers += [WideBlock(channels, width, stride=2 if stage else 1), WideBlock(width, width, stride=1)]
        channels = width
    head = nn.Linear(channels, num_classes)
    nn.init.normal_(head.weight, std=channels**-0.5)
    nn.init.zeros_(head.bias)
    return nn.Sequential(*layers, nn.ReLU(), nn.GroupNorm(16, channels), *_pool(), head)


class BasicBlock(nn.Module):
    """``relu(residual(x) + shortcut(x))``, ``[B, C, H, W] -> [B, channels, H / stride, W / stride]``."""

    def __init__(self, in_channels: int, channels: int, *, stride: int, groups: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False),
            nn.GroupNorm(groups, channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(groups, channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.GroupNorm(groups, channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.residual(x) + self.shortcut(x))


class WideBlock(nn.Module):
    """``residual(x) + shortcut(x)``, normalised before each convolution; shapes as ``BasicBlock``."""

    def __init__(self, in_channels: int, channels: int, *, stride: int, groups: int = 16) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.ReLU(),
            nn.GroupNorm(groups, in_channels),
            WSConv2d(in_channels, channels, 3, stride=stride),
            nn.ReLU(),
            nn.GroupNorm(groups, channels),
            WSConv2d(channels, channels, 3),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.ReLU(),
                nn.GroupNorm(groups, in_channels),
                WSConv2d(in_channels, channels, 1, stride=stride),
            )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.residual(x) + self.shortcut(x)
        return out


class WSConv2d(nn.Conv2d):
    """Convolution whose filters have mean 0 and norm ``gain``; padding keeps sides at stride 1.

    Each filter ``w`` of ``weight[O, I, k, k]`` acts as ``gain * (w - mean(w)) / sqrt(max(N var(w), 1e-4))``
    with ``N = I k k`` and ``var`` the population variance: a function of the parameters alone, no data.
    A per-example engine must differentiate through this; the gradient of a plain convolution is not it.
    Source: Qiao et al. (2019), scaled as in Brock et al. (2021) and the code of De et al. (2022).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2)
        self.gain = nn.Parameter(torch.ones(out_channels))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def standardized_weight(self) -> Tensor:
        """``[O, I, k, k]``, what ``forward`` convolves with."""
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        squared_norm = centred.square().sum((1, 2, 3), keepdim=True)
        scale = self.gain[:, None, None, None] * squared_norm.clamp(min=1e-4).rsqrt()
        standard: Tensor = scale * centred
        return standard

    def forward(self, input: Tensor) -> Tensor:
        weight = self.standardized_weight()
        return nn.functional.conv2d(input, weight, self.bias, self.stride, self.padding)


def _resnet(channels: int, num_classes: int, *, widths: tuple[int, ...], blocks: int, groups: int) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(channels, widths[0], 3, padding=1, bias=False),
        nn.GroupNorm(groups, widths[0]),
        nn.ReLU(),
    ]
    channels = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers.append(BasicBlock(channels, width, stride=stride, groups=groups))
            channels = width
    return nn.Sequential(*layers, *_pool(), nn.Linear(channels, num_classes))


def _pool() -> tuple[nn.Module, nn.Module]:
    """Mean over positions, ``[B, C, H, W] -> [B, C]``."""
    return nn.AdaptiveAvgPool2d(1), nn.Flatten()


MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet20-gn": resnet20_gn,
    "wrn16-4-gn": wrn16_4_gn,
    "resnet10-gn": resnet10_gn,
}
