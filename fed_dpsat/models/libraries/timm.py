"""``timm:NAME``: any network of ``timm.list_models()``, without weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fed_dpsat.models._shapes import image_shape
from fed_dpsat.models.libraries import check_arguments, imported, unknown


def factory(name: str) -> Callable[..., nn.Module]:
    """``(input_shape, num_classes, **arguments) -> nn.Module``; ``ModelError`` for a name that timm does not have."""
    model = f"timm:{name}"
    timm = imported("timm", model, "vision")
    if ":" in name or not timm.is_model(name):  # timm would fetch the configuration of hf-hub:NAME
        raise unknown(model, name, timm.list_models(), "a network of timm")

    def make(input_shape: tuple[int, ...], num_classes: int, **arguments: Any) -> nn.Module:
        """``x[B, C, H, W] -> logits[B, num_classes]``, in the initial weights of timm."""
        check_arguments(model, arguments)
        channels, *size = image_shape(model, input_shape, min_side=1)
        given = {"in_chans": channels, "num_classes": num_classes, **arguments}
        if "img_size" not in given and timm.get_pretrained_cfg(name).fixed_input_size:
            try:
                return _created(timm, name, {**given, "img_size": tuple(size)})
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
        return _created(timm, name, given)

    return make


def _created(timm: Any, name: str, arguments: dict[str, Any]) -> nn.Module:
    made: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    return made
