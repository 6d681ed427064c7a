"""Networks of timm have the channels, classes and sizes of the data, and wrong names lead to near ones."""

import pytest
import torch

from fed_dpsat.errors import ModelError
from fed_dpsat.plugins import PluginError, build, load
from fed_dpsat.testing import check_model

SMALL_VIT = "depth = 1, embed_dim = 24, num_heads = 2, patch_size = 4"


def make(name, shape, arguments="", classes=4):
    return build("model", f"timm:{name}", {"input_shape": shape, "num_classes": classes}, arguments)


@pytest.mark.parametrize(
    ("name", "shape", "arguments"),
    [
        ("vit_tiny_patch16_224", (1, 8, 8), SMALL_VIT),
        ("vit_tiny_patch16_224.augreg_in21k", (3, 8, 16), SMALL_VIT),
        ("test_convnext", (3, 32, 32), ""),  # built without a size
    ],
)
def test_a_network_fits_the_data(timm, name, shape, arguments):
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    assert make(name, shape, arguments)(torch.zeros(2, *shape)).shape == (2, 4)


def test_weights_follow_the_seed_and_arguments_reach_timm(timm):
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(make("vit_tiny_patch16_224", (1, 8, 8), SMALL_VIT))
    first, again, other = (m.patch_embed.proj.weight for m in made)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(made[0].blocks) == 1
    assert tuple(first.shape) == (24, 1, 4, 4)


def test_a_network_conforms(timm):
    check_model(lambda: make("vit_tiny_patch16_224", (1, 8, 8), SMALL_VIT, 10), input_shape=(1, 8, 8))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_225", "'vit_tiny_patch16_225' is not a network of timm; did you mean vit_tiny_patch16_224"),
        ("hf-hub:timm/resnet18", "did you mean .*resnet18"),  # timm would ask the hub
        ("", "is not a network of timm"),
    ],
)
def test_a_wrong_name_leads_to_near_ones(timm, name, message):
    with pytest.raises(ModelError, match=message):
        load("model", f"timm:{name}")


def test_what_timm_refuses_is_one_line(timm):
    with pytest.raises(PluginError, match=r"model='timm:resnet18' fails: TypeError: .*'droprate'"):
        make("resnet18", (3, 32, 32), "droprate = 0.1")
    with pytest.raises(ModelError, match=r"model='timm:resnet18': input_shape=\(64,\) is not"):
        make("resnet18", (64,))
