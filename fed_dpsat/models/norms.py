"""GroupNorm in the place of BatchNorm, which mixes the examples of a batch: the setting ``norm``.

Opacus' ``ModuleValidator`` makes each new layer: gcd(32, C) groups of the C channels. It gets weight, bias and eps of
the old one, so that initial weights that a library chose stay. Running statistics are dropped.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fed_dpsat.errors import ModelError

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""What a BatchNorm keeps of the batches that it saw."""

MOST_GROUPS, LEAST_CHANNELS = 32, 8
"""Of a BatchNorm1d. A group of one channel without a length would be 0 whatever the input is."""

SHOWN = 3


def with_norm(module: nn.Module, norm: str) -> tuple[nn.Module, str]:
    """``module``, with each BatchNorm replaced if ``norm`` is "group", and a line that says what was replaced.

    The line is empty if nothing was. Raises ``ModelError`` for a BatchNorm if ``norm`` is empty, and for one that
    computes something of its own.
    """
    found = {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}
    if not found:
        return module, ""
    listed = _listed(found)
    if not norm:
        raise ModelError(
            f"{type(module).__name__} has layers that mix examples: {listed}; set norm='group' to replace each "
            "BatchNorm by a GroupNorm, or use a model without BatchNorm"
        )
    new = {id(layer): _group_norm(name, layer) for name, layer in found.items()}
    for parent in list(module.modules()):
        for key, child in parent._modules.items():
            if id(child) in new:
                parent._modules[key] = new[id(child)]
    return new.get(id(module), module), f"norm='group' replaced {listed} by GroupNorm"


def statistics_of_others(module: nn.Module, names: list[str]) -> list[str]:
    """Those of ``names`` that are statistics of a BatchNorm that is a GroupNorm in ``module``."""
    layers = dict(module.named_modules())
    parts = ((name, *name.rpartition(".")[::2]) for name in names)
    return [name for name, layer, key in parts if key in STATISTICS and isinstance(layers.get(layer), nn.GroupNorm)]


def _group_norm(name: str, layer: Any) -> Any:
    from opacus.validators import ModuleValidator  # type: ignore[import-untyped]

    kind = next(kind for kind in type(layer).__mro__ if kind.__module__.startswith("torch."))
    if kind not in ModuleValidator.FIXERS:
        raise ModelError(f"norm='group' replaces no {kind.__name__} ({name}); call the model once before it is given")
    groups = None if kind is not nn.BatchNorm1d else _groups(layer.num_features)
    plain = ModuleValidator.FIXERS[kind](layer, num_groups=groups)
    new = plain if type(layer) is kind else _with_activation(name, layer, plain)
    new.eps = layer.eps
    if layer.affine:
        new.weight, new.bias = layer.weight, layer.bias
    new.training = layer.training
    return new


def _groups(channels: int) -> int:
    """The most groups of a BatchNorm1d that hold ``LEAST_CHANNELS`` each; 1 for fewer channels."""
    fits = (g for g in range(MOST_GROUPS, 1, -1) if not channels % g and channels // g >= LEAST_CHANNELS)
    return next(fits, 1)


def _with_activation(name: str, layer: Any, plain: Any) -> Any:
    """For timm's BatchNormAct2d, which drops and activates after it normalises; ``ModelError`` for another class."""
    if type(layer).__name__ != "BatchNormAct2d" or not type(layer).__module__.startswith("timm."):
        raise ModelError(
            f"norm='group' does not know what {name} ({type(layer).__module__}.{type(layer).__name__}) computes beside "
            "BatchNorm; build the model with another normalisation"
        )
    new = importlib.import_module("timm.layers").GroupNormAct(
        plain.num_channels, num_groups=plain.num_groups, affine=plain.affine
    )
    new.drop, new.act = layer.drop, layer.act
    return new


def _listed(found: dict[str, Any]) -> str:
    """``bn1 (BatchNorm2d), layer1.0.bn1 (BatchNorm2d), layer1.0.bn2 (BatchNorm2d) and 17 more``."""
    names = [f"{name or 'itself'} ({type(layer).__name__})" for name, layer in found.items()]
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
