"""What every built-in model keeps; a new one joins by one row of ``ROWS``."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fed_dpsat.plugins import builtin, summary

ROWS = {
    # name: (shape of the documented count, parameters at it with 10 classes, shape of the cheap checks)
    "linear": ((64,), 650, (64,)),
    "mlp": ((64,), 9_610, (1, 8, 8)),
    "mlp-small": ((64,), 2_410, (1, 8, 8)),
    "tanh-cnn-small": ((3, 32, 32), 33_834, (1, 8, 8)),
    "selu-cnn-small": ((3, 32, 32), 33_834, (1, 8, 8)),
    "tanh-cnn": ((3, 32, 32), 550_570, (3, 8, 8)),
    "resnet20-gn": ((3, 32, 32), 272_474, (3, 8, 8)),
    "wrn16-4-gn": ((3, 32, 32), 2_753_818, (3, 8, 8)),
    "resnet10-gn": ((1, 28, 28), 4_902_090, (1, 8, 8)),
    "dpnasnet-cifar": ((3, 32, 32), 529_434, (3, 32, 32)),
    "dpnasnet-fashion-mnist": ((1, 28, 28), 214_570, (1, 28, 28)),
    "scattering-cnn-fashion-mnist": ((81, 7, 7), 33_066, (3, 7, 7)),
    "scattering-cnn-cifar10": ((243, 8, 8), 187_210, (3, 4, 4)),
}
OF_TEXTS = {"gpt", "gru"}
"""Held in ``test_text``."""
each_model = pytest.mark.parametrize("name", ROWS)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return builtin("model")[name](ROWS[name][2], 10).double()


def examples(name: str, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, *ROWS[name][2], generator=generator, dtype=torch.float64)
    return x, torch.arange(count) % 10


def depends_on_the_batch(model: nn.Module, x: Tensor) -> bool:
    """Whether the first example's output changes when the others are doubled."""
    others_doubled = torch.cat([x[:1], 2 * x[1:]])
    with torch.no_grad():
        return not torch.allclose(model(x)[:1], model(others_doubled)[:1], rtol=1e-9, atol=1e-9)


def test_every_builtin_model_has_a_row():
    assert set(ROWS) | OF_TEXTS == set(builtin("model"))


@each_model
def test_parameter_count_is_the_documented_one(name):
    shape, count, _ = ROWS[name]
    factory = builtin("model")[name]
    assert sum(p.numel() for p in factory(shape, 10).parameters()) == count
    assert f"{count:,}" in summary(factory)
    assert len(summary(factory)) <= 110


@each_model
def test_logits_have_one_column_per_class(name):
    shape = ROWS[name][2]
    assert builtin("model")[name](shape, 7)(torch.zeros(2, *shape)).shape == (2, 7)


@each_model
def test_vmap_gradients_equal_a_loop_over_single_examples(name):
    model = build(name)
    x, y = examples(name, 2)
    params = {key: p.detach() for key, p in model.named_parameters()}

    def loss(params, x, y):
        return nn.functional.cross_entropy(functional_call(model, params, (x[None],)), y[None])

    per_example = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)
    for i in range(2):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        for key, p in model.named_parameters():
            torch.testing.assert_close(per_example[key][i], p.grad, rtol=1e-9, atol=1e-11)


@each_model
def test_no_batch_statistics_and_no_mode(name):
    model = build(name)
    x, _ = examples(name, 3)
    assert not list(model.buffers())
    assert not depends_on_the_batch(model, x)
    with torch.no_grad():
        assert torch.equal(model.train()(x), model.eval()(x))


def test_batch_norm_would_be_seen():
    x, _ = examples("linear", 3)
    assert depends_on_the_batch(nn.BatchNorm1d(64).double(), x)


@each_model
def test_nothing_is_in_place(name):
    model = build(name)
    assert not any(getattr(module, "inplace", False) for module in model.modules())


@each_model
def test_initial_weights_follow_the_global_seed(name):
    models = (build(name, seed) for seed in (0, 0, 1))
    first, again, other = (nn.utils.parameters_to_vector(model.parameters()) for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
