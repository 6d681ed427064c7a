"""``torchvision:NAME``: a network of ``torchvision.models`` by its name, or by its class, without weights.

Networks of torchvision take three channels. For images with another number of channels the first convolution becomes
one of that number, with torch's own initial weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fed_dpsat.errors import ModelError
from fed_dpsat.models._shapes import image_shape
from fed_dpsat.models.libraries import check_arguments, imported, unknown

CHANNELS = 3
SIDE = ("vit_", "VisionTransformer")
"""Networks that are built for one side of square images, ``image_size``."""
SIDES = ("maxvit", "MaxVit")
"""Networks that are built for one height and width, ``input_size``."""
ONE_OUTPUT = {"googlenet": {"aux_logits": False, "init_weights": True}}
ONE_OUTPUT["inception_v3"] = ONE_OUTPUT["googlenet"]
"""Networks that have other heads while they train, unless they are told not to."""


def factory(name: str) -> Callable[..., nn.Module]:
    """``(input_shape, num_classes, **arguments) -> nn.Module``; ``ModelError`` for a name that is not there."""
    model = f"torchvision:{name}"
    models = imported("torchvision", model, "vision").models
    named = models.list_models(module=models)
    classes = [key for key, value in vars(models).items() if isinstance(value, type) and issubclass(value, nn.Module)]
    if name not in named and name not in classes:
        raise unknown(model, name, [*named, *classes], "a network of torchvision.models")
    build = getattr(models, name)

    def make(input_shape: tuple[int, ...], num_classes: int, **arguments: Any) -> nn.Module:
        """``x[B, C, H, W] -> logits[B, num_classes]``, in the initial weights of torchvision."""
        check_arguments(model, arguments)
        channels, height, width = image_shape(model, input_shape, min_side=1)
        made: nn.Module = build(
            **{
                "num_classes": num_classes,
                **size_for(model, name, height, width),
                **ONE_OUTPUT.get(name, {}),
                **arguments,
            }
        )
        return made if channels == CHANNELS else _with_channels(made, channels)

    return make


def size_for(model: str, name: str, height: int, width: int) -> dict[str, Any]:
    """The arguments that tell the network ``name`` the size of images; ``ModelError`` if it needs square ones."""
    if name.startswith(SIDES):
        return {"input_size": (height, width)}
    if not name.startswith(SIDE):
        return {}
    if height != width:
        raise ModelError(f"model={model!r}: images of {height}x{width} are not square; use timm:vit_tiny_patch16_224")
    return {"image_size": height}


def _with_channels(network: nn.Module, channels: int) -> nn.Module:
    path, old = next((path, m) for path, m in network.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        channels,
        old.out_channels,
        kernel_size=old.kernel_size,  # type: ignore[arg-type]
        stride=old.stride,  # type: ignore[arg-type]
        padding=old.padding,  # type: ignore[arg-type]
        dilation=old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None,
        padding_mode=old.padding_mode,
    )
    parent, _, key = path.rpartition(".")
    setattr(network.get_submodule(parent), key, new)
    return network
