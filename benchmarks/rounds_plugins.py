"""Data sets and models of the round benchmark, as plug-ins of its configurations."""

from __future__ import annotations

import torch
from torch import nn

from fed_dpsat.data.cifar10 import SOURCE, cifar10
from fed_dpsat.data.dataset import Dataset, Examples

EXAMPLES_PER_CLIENT = 50
TEST_EXAMPLES = 500
FEATURES, CLASSES = 16, 10
SMALL_EXAMPLES = 64


def cifar_clients(num_clients: int, data_source: str, data_path: str, cache_dir: str) -> Dataset:
    """The first 50 CIFAR-10 images per client, 500 test images; random images where ``data_path`` is empty."""
    size = EXAMPLES_PER_CLIENT * num_clients
    if not data_path:
        splits = [_images(size, 1), _images(TEST_EXAMPLES, 2)]
    else:
        whole = cifar10(data_source, data_path, cache_dir)
        splits = [_first(whole.train, size), _first(whole.test, TEST_EXAMPLES)]
    return Dataset(name="cifar10-clients", train=splits[0], test=splits[1], class_names=SOURCE.class_names)


def _first(examples: Examples, size: int) -> Examples:
    return Examples(
        inputs=examples.inputs[:size].clone(), labels=examples.labels[:size], mean=examples.mean, std=examples.std
    )


def _images(size: int, seed: int) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(256, (size, *SOURCE.shape), generator=generator, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    return Examples(inputs=inputs, labels=labels, mean=SOURCE.mean, std=SOURCE.std)


def one_example_each(num_clients: int) -> Dataset:
    """One example of 16 normal numbers per client, 100 to test on: the smallest federation of any size."""

    def examples(size: int, seed: int) -> Examples:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(size, FEATURES, generator=generator)
        labels = torch.randint(CLASSES, (size,), generator=generator)
        return Examples(inputs=inputs, labels=labels, mean=(0.0,) * FEATURES, std=(1.0,) * FEATURES)

    names = tuple("0123456789")
    return Dataset(name="one-example-each", train=examples(num_clients, 1), test=examples(100, 2), class_names=names)


def small_images(num_clients: int) -> Dataset:
    """``SMALL_EXAMPLES`` random images of 1x8x8 per client, 100 to test on."""
    names = tuple("0123456789")
    train, test = _noise(SMALL_EXAMPLES * num_clients, 1), _noise(100, 2)
    return Dataset(name="small-images", train=train, test=test, class_names=names)


def _noise(size: int, seed: int) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 1, 8, 8, generator=generator)
    return Examples(inputs=inputs, labels=torch.randint(CLASSES, (size,), generator=generator), mean=(0.0,), std=(1.0,))


def pfl_cnn(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The CNN of pfl-research's CIFAR-10 benchmark: 1,626,442 parameters at 3x32x32.

    Two 3x3 convolutions without padding, 32 and 64 channels, 2x2 max pooling, dropout 0.25, a linear layer to 128,
    dropout 0.5, a linear layer; ReLU, Glorot weights. Source: ``benchmarks/model/pytorch/cnn.py`` of
    apple/pfl-research; there images come as [H, W, C] and are turned, here they come as [C, H, W].
    """
    channels, height, width = input_shape
    layers = [
        nn.Conv2d(channels, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, num_classes),
    ]
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    return nn.Sequential(*layers)


class Padded(nn.Module):
    """A linear layer, and eight tensors of parameters that nothing uses: ``model_mb`` MB (10^6 bytes) together."""

    def __init__(self, model_mb: float) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES)
        unused = int(model_mb * 1e6 / 4) - sum(p.numel() for p in self.linear.parameters())
        self.padding = nn.ParameterList(torch.randn(max(unused // 8, 1)) for _ in range(8))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``inputs[B, 16] -> logits[B, 10]``."""
        logits: torch.Tensor = self.linear(inputs)
        return logits
