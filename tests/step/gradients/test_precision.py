"""bfloat16 in the layers: one example's gradient is rounded, what is clipped is still what is summed."""

import pytest
import torch
from torch import nn

from fed_dpsat.errors import SettingError
from fed_dpsat.models.cnn import tanh_cnn, tanh_cnn_small
from fed_dpsat.models.mlp import mlp
from fed_dpsat.models.resnet import resnet20_gn, wrn16_4_gn
from fed_dpsat.params import global_norm, trainable
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.gradients.per_example import ModelLoss, clipped_gradient_sum

UNCLIPPED = FlatClipping(clip_norm=1e9)  # with inf there are no examples to tell apart: one ordinary pass
NETWORKS = {
    "mlp": (mlp, (1, 8, 8)),
    "tanh-cnn-small": (tanh_cnn_small, (1, 8, 8)),
    "tanh-cnn": (tanh_cnn, (3, 16, 16)),
    "resnet20-gn": (resnet20_gn, (3, 16, 16)),
    "wrn16-4-gn": (wrn16_4_gn, (3, 8, 8)),
}


def network(name):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    return make(shape, 4), (torch.randn(4, *shape), torch.tensor([0, 1, 2, 3]))


def norm(params):
    return float(global_norm({name: p.double() for name, p in params.items()}))


@pytest.mark.parametrize("engine", ["planned", "vmap"])
@pytest.mark.parametrize("name", ["mlp", "tanh-cnn-small", "tanh-cnn"])
def test_the_gradient_is_within_five_percent_of_float64(engine, name):
    """Deep ReLU networks part further, at their kinks. float32 is 1e-7 away, so this does compute in bfloat16."""
    module, batch = network(name)
    loss = ModelLoss(module, precision="bfloat16")
    total, _ = clipped_gradient_sum(loss, trainable(module), batch, UNCLIPPED, engine=engine)
    assert {p.dtype for p in total.values()} == {torch.float32}
    module.double()
    exact, _ = clipped_gradient_sum(
        ModelLoss(module), trainable(module), (batch[0].double(), batch[1]), UNCLIPPED, engine="vmap"
    )
    away = norm({name: total[name].double() - g for name, g in exact.items()}) / norm(exact)
    assert 1e-3 < away < 0.05


@pytest.mark.parametrize("name", NETWORKS)
def test_the_bound_is_as_exact_as_in_float32(name):
    """Gradients of 1e4 times C, one example at a time, each within C(1 + 1e-6)."""
    module, (inputs, targets) = network(name)
    loss, params = ModelLoss(module, precision="bfloat16"), trainable(module)
    for x, y in zip(inputs * torch.tensor([1.0, 30.0, 0.01, 1.0]).view(-1, 1, 1, 1), targets, strict=True):
        one = x[None], y[None]
        bound = norm(clipped_gradient_sum(loss, params, one, UNCLIPPED, engine="planned")[0]) / 1e4
        total, _ = clipped_gradient_sum(loss, params, one, FlatClipping(clip_norm=bound), engine="planned")
        assert bound * (1 - 1e-5) < norm(total) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("strategy", ["product", "rows", "channels", "single"])
def test_every_strategy_of_a_convolution_sums_what_it_measured(strategy, monkeypatch):
    monkeypatch.setattr("fed_dpsat.step.gradients.conv.choose", lambda *_: strategy)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Flatten())
    loss = ModelLoss(module, lambda outputs, targets: outputs.square().sum(1), precision="bfloat16")
    params, x = trainable(module), torch.randn(1, 3, 6, 6)
    for clip_norm in (1e-3, 1e-1):
        total, _ = clipped_gradient_sum(
            loss, params, (x, torch.zeros(1)), FlatClipping(clip_norm=clip_norm), engine="planned"
        )
        assert norm(total) == pytest.approx(clip_norm, rel=1e-6)


def test_an_unknown_precision_says_which_there_are():
    with pytest.raises(SettingError, match="precision='float16' is not one of float32, bfloat16"):
        ModelLoss(nn.Linear(2, 2), precision="float16")
