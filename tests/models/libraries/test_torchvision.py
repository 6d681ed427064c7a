"""Networks of torchvision have the channels, classes and sizes of the data, and wrong names lead to near ones."""

import pytest
import torch

from fed_dpsat.errors import ModelError
from fed_dpsat.models.libraries.torchvision import size_for
from fed_dpsat.plugins import PluginError, build, load
from fed_dpsat.testing import check_model

VIT = "patch_size = 4, num_layers = 1, num_heads = 2, hidden_dim = 16, mlp_dim = 16"
SWIN = "patch_size = [2, 2], embed_dim = 8, depths = [1, 1], num_heads = [2, 2], window_size = [2, 2]"

pytestmark = pytest.mark.usefixtures("torchvision")


def make(name, shape, arguments="", classes=4):
    return build("model", f"torchvision:{name}", {"input_shape": shape, "num_classes": classes}, arguments)


@pytest.mark.parametrize(
    ("name", "shape", "arguments"),
    [
        ("squeezenet1_1", (3, 32, 32), ""),
        ("squeezenet1_1", (1, 32, 48), ""),  # another first convolution
        ("VisionTransformer", (1, 8, 8), VIT),
        ("SwinTransformer", (3, 8, 8), SWIN),
    ],
)
def test_a_network_fits_the_data(name, shape, arguments):
    assert make(name, shape, arguments).eval()(torch.zeros(2, *shape)).shape == (2, 4)


def test_a_builder_gets_the_size_of_images():
    assert size_for("m", "vit_b_32", 64, 64) == {"image_size": 64}
    assert size_for("m", "maxvit_t", 32, 64) == {"input_size": (32, 64)}
    assert size_for("m", "resnet18", 32, 64) == {}
    with pytest.raises(ModelError, match="images of 32x64 are not square"):
        make("vit_b_32", (3, 32, 64))


def test_a_new_first_convolution_is_like_the_old_one():
    of_three, of_two = (make("mobilenet_v2", (c, 32, 32)).features[0][0] for c in (3, 2))
    assert (of_two.in_channels, of_three.in_channels) == (2, 3)
    assert of_two.extra_repr().partition(",")[2] == of_three.extra_repr().partition(",")[2]


def test_a_network_has_one_output_while_it_trains():
    made = make("googlenet", (3, 32, 32)).eval()
    assert made.aux_logits is False


def test_a_network_conforms():
    check_model(lambda: make("VisionTransformer", (1, 8, 8), VIT, 10), input_shape=(1, 8, 8))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", "'resnet81' is not a network of torchvision.models; did you mean .*resnet18"),
        ("VisionTransformr", "did you mean VisionTransformer"),
        ("list_models", "is not a network"),  # of torchvision.models too
        ("r3d_18", "is not a network of torchvision.models"),  # takes films
    ],
)
def test_a_wrong_name_leads_to_near_ones(name, message):
    with pytest.raises(ModelError, match=message):
        load("model", f"torchvision:{name}")


def test_an_argument_that_is_missing_is_one_line():
    with pytest.raises(PluginError, match=r"fails: TypeError: .*missing 5 required"):
        make("VisionTransformer", (3, 8, 8))
