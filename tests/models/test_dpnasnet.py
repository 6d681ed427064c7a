import dataclasses
import math

import pytest
import torch
from torch import nn

from fed_dpsat.models.dpnasnet import (
    CIFAR,
    FASHION_MNIST,
    OPERATIONS,
    Cell,
    Genotype,
    dpnasnet_cifar,
    dpnasnet_fashion_mnist,
)

FACTORIES = [(dpnasnet_cifar, CIFAR, 4, "0.5294"), (dpnasnet_fashion_mnist, FASHION_MNIST, 3, "0.2146")]


@pytest.mark.parametrize(("factory", "genotype", "side", "published"), FACTORIES)
def test_count_layer_by_layer_is_the_published_one(factory, genotype, side, published):
    widths = genotype.cell_widths
    stem = 9 * genotype.input_shape[0] * genotype.stem_width
    inputs = (genotype.stem_width, 5 * widths[0], 5 * widths[1])
    enter = sum(i * o for i, o in zip(inputs, widths, strict=True))
    depthwise = sum(9 * sum(widths) for operation, _, _ in genotype.edges if operation >= 4)
    tail = 5 * widths[2] * 128 + (128 * side * side + 1) * 128 + 129 * 10
    count = sum(p.numel() for p in factory(genotype.input_shape, 10).parameters())
    assert count == stem + enter + depthwise + tail
    assert f"{count / 1e6:.4f}" == published


def test_a_cell_adds_edges_and_concatenates_states():
    """Identities only: states 1 to 5 are s, s, 2s, 3s, s where s is state 0."""
    edges = ((3, 0, 1), (0, 0, 2), (3, 1, 2), (3, 1, 3), (3, 2, 3), (3, 0, 4), (3, 3, 4), (3, 1, 5))
    cell = Cell(8, 8, edges)
    x = torch.randn(2, 8, 4, 4)
    start = cell.enter(x)
    torch.testing.assert_close(cell(x), torch.cat([start, start, 2 * start, 3 * start, start], dim=1))


@pytest.mark.parametrize(("number", "expected"), [(1, 9.0), (2, 5.0), (3, 5.0)])
def test_pools_and_identity_at_the_centre_of_1_to_9(number, expected):
    image = torch.arange(1.0, 10).reshape(1, 1, 3, 3)
    assert OPERATIONS[number](1)(image)[0, 0, 1, 1] == expected


@pytest.mark.parametrize(("number", "activation"), [(4, torch.relu), (5, torch.selu), (6, torch.tanh), (7, None)])
def test_depthwise_operations_normalise_then_activate(number, activation):
    torch.manual_seed(0)
    operation = OPERATIONS[number](8)
    (convolution,) = (m for m in operation.modules() if isinstance(m, nn.Conv2d))
    assert (convolution.groups, convolution.bias) == (8, None)
    x = torch.randn(2, 8, 4, 4)
    normal = nn.functional.group_norm(convolution(x), 8)
    torch.testing.assert_close(operation(x), activation(normal) if activation else normal)


def test_convolutions_start_with_variance_2_over_area_times_output_channels():
    torch.manual_seed(0)
    cell = dpnasnet_cifar((3, 32, 32), 10)[6]
    for weight, area in [(cell.enter[0].weight, 1), (cell.edges["0_1"][0][0].weight, 9)]:
        spread = weight.std().item() * math.sqrt(area * 192 / 2)
        assert spread == pytest.approx(1, abs=4 / math.sqrt(2 * weight.numel()))


@pytest.mark.parametrize(
    ("factory", "shape", "instead"),
    [
        (dpnasnet_cifar, (1, 28, 28), "use 'dpnasnet-fashion-mnist'"),
        (dpnasnet_fashion_mnist, (3, 32, 32), "use 'dpnasnet-cifar'"),
        (dpnasnet_cifar, (3, 64, 64), "use 'resnet20-gn' or"),
        (dpnasnet_cifar, (3072,), "'mlp' for vectors"),
    ],
)
def test_other_shapes_are_refused(factory, shape, instead):
    with pytest.raises(ValueError, match=r"model='dpnasnet-.*input_shape=.* is not \(\d, ..") as error:
        factory(shape, 10)
    assert instead in str(error.value)


@pytest.mark.parametrize("edge", [(8, 0, 1), (-1, 0, 1), (3, 2, 1), (3, 1, 1), (3, 0, 6)])
def test_an_impossible_edge_is_refused(edge):
    with pytest.raises(ValueError, match="operation 0 to 7"):
        dataclasses.replace(CIFAR, edges=(*CIFAR.edges, edge))


def test_a_state_that_receives_nothing_is_refused():
    with pytest.raises(ValueError, match="state 4 without input"):
        Genotype(
            input_shape=(1, 28, 28),
            stem_width=8,
            cell_widths=(8,),
            activation=nn.Tanh,
            edges=((3, 0, 1), (3, 0, 2), (3, 0, 3), (0, 0, 4), (3, 0, 5)),
        )
