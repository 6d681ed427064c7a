"""DPNASNet, cells that a search found to train well under DP-SGD (Cheng et al., AAAI 2022).

A cell is a small graph: state 0 is its input after a 1x1 convolution to C channels and GroupNorm, an edge
``(operation, source, target)`` adds ``operation(state[source])`` to its target, and the output is states 1
to 5 side by side, 5 C channels. Numbers of operations and genotypes are those of the authors' code.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fed_dpsat.errors import ModelError
from fed_dpsat.models._shapes import shape_error

GROUPS = 8
STATES = 5
TAIL_WIDTH = 128

NO_EDGE = 0
OPERATIONS: dict[int, Callable[[int], nn.Module]] = {
    1: lambda channels: nn.MaxPool2d(3, stride=1, padding=1),
    2: lambda channels: nn.AvgPool2d(3, stride=1, padding=1),
    3: lambda channels: nn.Identity(),
    4: lambda channels: nn.Sequential(_depthwise(channels), nn.ReLU()),
    5: lambda channels: nn.Sequential(_depthwise(channels), nn.SELU()),
    6: lambda channels: nn.Sequential(_depthwise(channels), nn.Tanh()),
    7: lambda channels: _depthwise(channels),
}


@dataclass(frozen=True, kw_only=True)
class Genotype:
    """A network of three cells: its edges, as ``(operation, source, target)``, and its widths.

    ``ModelError`` if an edge does not run forward among states 0 to 5, or a state receives nothing.
    """

    input_shape: tuple[int, int, int]
    stem_width: int
    cell_widths: tuple[int, ...]
    activation: type[nn.Module]
    edges: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        for edge in self.edges:
            if edge[0] not in (NO_EDGE, *OPERATIONS) or not 0 <= edge[1] < edge[2] <= STATES:
                raise ModelError(f"edge={edge} is not (operation 0 to 7, source, later target to {STATES})")
        reached = {target for operation, _, target in self.edges if operation != NO_EDGE}
        if missing := set(range(1, STATES + 1)) - reached:
            raise ModelError(f"edges leave state {min(missing)} without input; add an edge to it")


CIFAR = Genotype(
    input_shape=(3, 32, 32),
    stem_width=48,
    cell_widths=(48, 96, 192),
    activation=nn.SELU,
    edges=(
        (5, 0, 1),
        (1, 0, 2),
        (5, 1, 2),
        (6, 0, 3),
        (1, 1, 3),
        (0, 2, 3),
        (5, 0, 4),
        (0, 1, 4),
        (0, 2, 4),
        (3, 3, 4),
        (5, 0, 5),
        (5, 1, 5),
        (6, 2, 5),
        (1, 3, 5),
        (6, 4, 5),
    ),
)
FASHION_MNIST = Genotype(
    input_shape=(1, 28, 28),
    stem_width=32,
    cell_widths=(32, 32, 64),
    activation=nn.Tanh,
    edges=(
        (3, 0, 1),
        (0, 0, 2),
        (5, 1, 2),
        (4, 0, 3),
        (5, 1, 3),
        (3, 2, 3),
        (0, 0, 4),
        (0, 1, 4),
        (6, 2, 4),
        (3, 3, 4),
        (5, 0, 5),
        (6, 1, 5),
        (1, 2, 5),
        (4, 3, 5),
        (1, 4, 5),
    ),
)


def dpnasnet_cifar(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """DPNASNet for CIFAR (Cheng et al. 2022): 529,434 parameters at 3x32x32, 10 classes.

    ``x[B, 3, 32, 32] -> logits[B, num_classes]``. Convolutions start normal with variance
    2 / (kernel area x output channels), linear layers as torch's default.
    """
    return _build("dpnasnet-cifar", CIFAR, input_shape, num_classes)


def dpnasnet_fashion_mnist(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """DPNASNet for Fashion-MNIST (Cheng et al. 2022): 214,570 parameters at 1x28x28, 10 classes.

    ``x[B, 1, 28, 28] -> logits[B, num_classes]``. Convolutions start normal with variance
    2 / (kernel area x output channels), linear layers as torch's default.
    """
    return _build("dpnasnet-fashion-mnist", FASHION_MNIST, input_shape, num_classes)


class Cell(nn.Module):
    """One cell at ``channels``: ``[B, in_channels, H, W] -> [B, 5 channels, H, W]``."""

    def __init__(self, in_channels: int, channels: int, edges: tuple[tuple[int, int, int], ...]) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), _norm(channels))
        self.edges = nn.ModuleDict(
            {
                f"{source}_{target}": OPERATIONS[operation](channels)
                for operation, source, target in edges
                if operation != NO_EDGE
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        states: list[Tensor] = [self.enter(x)]
        for target in range(1, STATES + 1):
            terms = [
                self.edges[f"{source}_{target}"](state)
                for source, state in enumerate(states)
                if f"{source}_{target}" in self.edges
            ]
            states.append(functools.reduce(torch.add, terms))
        return torch.cat(states[1:], dim=1)


def _build(name: str, genotype: Genotype, input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    if tuple(input_shape) != genotype.input_shape:
        raise shape_error(name, input_shape, str(genotype.input_shape), _instead(input_shape))
    in_channels, side, _ = genotype.input_shape
    channels = genotype.stem_width
    layers = [nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), _norm(channels)]
    for width in genotype.cell_widths:
        layers += [Cell(channels, width, genotype.edges), nn.MaxPool2d(2)]
        channels, side = STATES * width, side // 2
    model = nn.Sequential(
        *layers,
        nn.Conv2d(channels, TAIL_WIDTH, 1, bias=False),
        _norm(TAIL_WIDTH),
        nn.Flatten(),
        nn.Linear(TAIL_WIDTH * side * side, TAIL_WIDTH),
        genotype.activation(),
        nn.Linear(TAIL_WIDTH, num_classes),
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            area = math.prod(module.kernel_size)
            nn.init.normal_(module.weight, std=math.sqrt(2 / (area * module.out_channels)))
    return model


def _instead(input_shape: tuple[int, ...]) -> str:
    named = {CIFAR.input_shape: "'dpnasnet-cifar'", FASHION_MNIST.input_shape: "'dpnasnet-fashion-mnist'"}
    return next(
        (name for shape, name in named.items() if shape == tuple(input_shape)),
        "'resnet20-gn' or 'tanh-cnn-small' for other images, 'mlp' for vectors",
    )


def _depthwise(channels: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    return nn.Sequential(convolution, _norm(channels))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, affine=False)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "dpnasnet-cifar": dpnasnet_cifar,
    "dpnasnet-fashion-mnist": dpnasnet_fashion_mnist,
}
