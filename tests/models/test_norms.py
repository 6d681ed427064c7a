"""A BatchNorm becomes a GroupNorm of the same weights, or is refused; examples do not mix after that."""

import pytest
import torch
from torch import nn

from fed_dpsat.errors import ModelError
from fed_dpsat.models.norms import with_norm
from fed_dpsat.models.pretrained import load_weights
from fed_dpsat.testing import check_model


def small(norm=nn.BatchNorm2d, channels=8):
    return nn.Sequential(
        nn.Conv2d(1, channels, 3), norm(channels, eps=1e-3), nn.ReLU(), nn.Flatten(), nn.Linear(channels * 36, 10)
    )


def groups(module):
    return [(layer.num_groups, layer.num_channels) for layer in module.modules() if isinstance(layer, nn.GroupNorm)]


def test_without_the_setting_it_is_the_remedy():
    with pytest.raises(
        ModelError, match=r"Sequential has layers that mix examples: 1 \(BatchNorm2d\); set norm='group' to replace"
    ):
        with_norm(small(), "")


def test_a_model_without_batch_norm_stays_as_it_is():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    for norm in ("", "group"):
        assert with_norm(model, norm) == (model, "")


def test_weights_and_eps_stay_and_statistics_go():
    model = small()
    nn.init.normal_(model[1].weight)
    old = model[1]
    made, note = with_norm(model, "group")
    assert note == "norm='group' replaced 1 (BatchNorm2d) by GroupNorm"
    assert type(made[1]) is nn.GroupNorm
    assert made[1].weight is old.weight
    assert made[1].bias is old.bias
    assert made[1].eps == 1e-3
    assert groups(made) == [(8, 8)]  # gcd(32, 8)
    assert list(made.buffers()) == []


def test_the_note_is_short():
    model = nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(20)))
    assert with_norm(model, "group")[1] == (
        "norm='group' replaced 0 (BatchNorm2d), 1 (BatchNorm2d), 2 (BatchNorm2d) and 17 more by GroupNorm"
    )


@pytest.mark.parametrize(("channels", "count"), [(4, 1), (8, 1), (10, 1), (32, 4), (64, 8), (512, 32), (7, 1)])
def test_a_group_of_features_has_more_than_one_channel(channels, count):
    made, _ = with_norm(nn.BatchNorm1d(channels), "group")
    assert groups(made) == [(count, channels)]
    assert made(torch.randn(3, channels)).abs().max() > 0.1


def test_opacus_itself_would_make_every_feature_zero():
    """The wrong version: 32 groups of one channel."""
    from opacus.validators import ModuleValidator

    assert ModuleValidator.fix(nn.BatchNorm1d(32))(torch.randn(3, 32)).abs().max() < 1e-3


def test_a_layer_without_weights_or_under_two_names_is_replaced_once():
    plain = nn.BatchNorm2d(8, affine=False)
    made, _ = with_norm(nn.Sequential(plain, nn.Conv2d(8, 8, 1), plain), "group")
    assert made[0] is made[2]
    assert not made[0].affine


def test_the_mode_stays():
    assert not with_norm(small().eval(), "group")[0][1].training


def test_a_replaced_model_conforms():
    check_model(lambda: with_norm(small(), "group")[0], input_shape=(1, 8, 8))


class Own(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) ** 2


@pytest.mark.parametrize(
    ("norm", "says"),
    [(Own, r"does not know what 1 \(.*\.Own\) computes"), (nn.LazyBatchNorm2d, "call the model once")],
)
def test_a_batch_norm_that_is_another_thing_is_refused(norm, says):
    made = nn.Sequential(nn.Conv2d(1, 8, 3), norm(8) if norm is Own else norm())
    with pytest.raises(ModelError, match=says):
        with_norm(made, "group")


def test_weights_of_a_model_with_batch_norm_are_loaded_without_its_statistics():
    torch.manual_seed(3)
    weights, (model, _) = small().state_dict(), with_norm(small(), "group")
    left_out = load_weights(model, weights, "w", new_head=False)
    assert left_out == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())


def test_timms_batch_norm_keeps_its_activation():
    timm = pytest.importorskip("timm", reason='pip install "fed_dpsat[vision]" to run this test')
    layer = timm.layers.BatchNormAct2d(8, act_layer=nn.Tanh)
    made, note = with_norm(nn.Sequential(layer), "group")
    assert "0 (BatchNormAct2d)" in note
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(made(x), torch.tanh(nn.functional.group_norm(x, 8, layer.weight, layer.bias)))


@pytest.mark.parametrize("name", ["timm:test_resnet", "timm:test_efficientnet", "torchvision:mobilenet_v3_small"])
def test_a_network_of_a_library_is_replaced_whole(name):
    from fed_dpsat.plugins import build

    pytest.importorskip(name.partition(":")[0], reason='pip install "fed_dpsat[vision]" to run this test')
    model, note = with_norm(build("model", name, {"input_shape": (3, 32, 32), "num_classes": 4}), "group")
    assert "and" in note
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules())
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x)[:1], model(x[:1]), rtol=1e-3, atol=1e-4)
