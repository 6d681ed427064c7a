"""An extractor of features: what it gives for a batch, and the check that it is frozen and keeps examples apart.

An extractor is a function, or a module in evaluation mode, from a batch of inputs to features ``[B, F]`` or
``[B, C, ...]``. A batch is what a model gets, without ``mean`` and ``std``: pixels are in 0..1, and several inputs are
arguments by name. The features of an example must not depend on the examples beside it, or its gradient would not be
the only one that it changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from fed_dpsat.data.dataset import Examples
from fed_dpsat.errors import DataError, SettingError
from fed_dpsat.plugins import PluginError
from fed_dpsat.step.placement import CPU

Extractor: TypeAlias = Callable[..., Tensor]


def check_extractor(name: str, extractor: Extractor, examples: Examples, device: torch.device = CPU) -> None:
    """Raise ``PluginError`` for an ``extractor`` that is not frozen, or whose features depend on a batch.

    ================================================ =======================================================
    a module, or a part of one, is in training mode  refused
    the result is not features ``[B, F]``            refused
    a second call gives other features               refused: it draws, or it counts
    an example alone, or beside others               equal features up to rounding, or refused
    a call changes a parameter or a buffer           refused
    ================================================ =======================================================
    """
    modules = list(extractor.named_modules()) if isinstance(extractor, nn.Module) else []
    if training := [part for part, module in modules if module.training]:
        raise _unfit(name, f"is in training mode ({training[0] or 'itself'})", "return it after .eval()")
    before = {part: value.detach().clone() for part, value in state_of(extractor).items()}
    rows = torch.arange(len(examples))
    group = max(examples.alike(rows), key=len)
    whole = extract(name, extractor, examples, group, device)
    again = extract(name, extractor, examples, group, device)
    alone = torch.cat([extract(name, extractor, examples, group[i : i + 1], device) for i in range(len(group))])
    if alone.shape != whole.shape:
        raise _unfit(name, f"gives {list(alone[0].shape)} for one example alone", "give each example the same shape")
    scale = whole.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    allowed = torch.finfo(whole.dtype).eps ** 0.5
    for other, what, remedy in (
        (again, "a second time", "draw and count nothing in a call"),
        (alone, "without the examples beside it", "compute each example by itself, without statistics of a batch"),
    ):
        moved = float(((whole - other).abs().amax() / scale).nan_to_num(torch.inf))
        if moved > allowed:
            raise _unfit(name, f"gives an example other features {what} (by {moved:.2g} of the largest)", remedy)
    after = state_of(extractor)
    if changed := [part for part, value in before.items() if not torch.equal(value, after[part])]:
        raise _unfit(name, f"changes {changed[0]!r} in a call", "return it after .eval(), frozen")


def extract(name: str, extractor: Extractor, examples: Examples, rows: Tensor, device: torch.device = CPU) -> Tensor:
    """Features of ``examples`` at ``rows[B]``, as the extractor gives them; ``DataError`` if it gives none.

    The text of that error may tell of an example, so a device keeps it.
    """
    plain = examples
    if examples.mean:
        plain = dataclasses.replace(examples, mean=(0.0,) * len(examples.mean), std=(1.0,) * len(examples.std))
    inputs, _ = plain.batch(rows, device)
    with torch.no_grad():
        try:
            found = extractor(inputs) if isinstance(inputs, Tensor) else extractor(**inputs)
        except DataError:
            raise
        except Exception as error:  # whatever an extractor raises
            said = next(iter(str(error).splitlines()), "")
            raise DataError(f"features={name!r} fails: {type(error).__name__}: {said}") from error
    if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != len(rows) or not found.is_floating_point():
        seen = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        remedy = "return numbers [B, F] or [B, C, ...]"
        raise DataError(f"features={name!r} gives {seen} for {len(rows)} examples; {remedy}")
    return found.detach()


def normalised(features: Tensor, norm: str, groups: int) -> Tensor:
    """``features[B, C, ...]`` by ``norm``, each example by itself, so that nothing is computed from the others.

    "group" is a GroupNorm of ``groups`` groups of channels without weights (Tramer and Boneh, arXiv:2011.11660); "unit"
    divides an example by its L2 norm; "" leaves them. Raises ``SettingError`` for groups that do not fit.
    """
    if norm == "group":
        channels, numbers = features.shape[1], features[0].numel()
        if channels % groups or numbers == groups:
            bound = f"a divisor of {channels}, the channels of the features, with several numbers in each group"
            raise SettingError("features_groups", groups, bound, "1 normalises all numbers of an example together")
        return functional.group_norm(features, groups)
    if norm == "unit":
        return functional.normalize(features.flatten(1), dim=1).view_as(features)
    return features


def state_of(extractor: Extractor) -> dict[str, Tensor]:
    """Parameters and buffers by name, also those that a state dict leaves out; empty for a function."""
    if not isinstance(extractor, nn.Module):
        return {}
    return {**dict(extractor.named_parameters()), **dict(extractor.named_buffers())}


def _unfit(name: str, seen: str, remedy: str) -> PluginError:
    return PluginError(f"features={name!r} {seen}; {remedy}")
