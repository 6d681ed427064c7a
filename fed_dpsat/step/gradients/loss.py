"""Per-example losses: what every engine takes a gradient of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_map

from fed_dpsat.errors import ModelError, SettingError
from fed_dpsat.params import Params
from fed_dpsat.step.examples import Examples, device_of
from fed_dpsat.step.gradients.call import call
from fed_dpsat.step.gradients.compiled import KERNELS

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

WIDE = frozenset({torch.float32, torch.float64})

BATCH_NORM, INSTANCE_NORM = _BatchNorm, _InstanceNorm


def cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    """``outputs[B, K], targets[B] -> losses[B]``; of outputs that are several, those that ``logits_of`` says."""
    logits = logits_of(outputs)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(wide, targets, reduction="none")


def logits_of(outputs: Any) -> Tensor:
    """A tensor itself, ``logits`` of an object or a dictionary (transformers), the first of a tuple.

    Raises ``ModelError`` for anything else.
    """
    if isinstance(outputs, dict) and "logits" in outputs:
        outputs = outputs["logits"]
    elif not isinstance(outputs, Tensor):
        outputs = outputs[0] if isinstance(outputs, tuple | list) and outputs else getattr(outputs, "logits", None)
    if not isinstance(outputs, Tensor):
        raise ModelError("a module whose outputs are no tensor, have no logits and no first tensor; wrap it")
    return outputs


@dataclass(frozen=True)
class ModelLoss:
    """The per-example loss of ``module`` as a function of its parameters.

    With ``precision`` "bfloat16" linear and convolution layers compute in that (``torch.autocast``), losses do not.
    Norms, sums and noise are in float32 whatever it is: what is rounded is one example's gradient, before clipping.
    ``kernels`` are the planned engine's on a CPU: "torch", or "compiled" ones (see ``compiled.py``) too.
    Raises ``ModelError`` for a module whose examples mix (BatchNorm and the like), naming the layer.
    """

    module: nn.Module
    criterion: Callable[[Any, Any], Tensor] = cross_entropy
    precision: str = "float32"
    kernels: str = "auto"

    def __post_init__(self) -> None:
        check_module(self.module)
        if self.precision not in PRECISIONS:
            raise SettingError("precision", self.precision, f"one of {', '.join(PRECISIONS)}", "choose one of those")
        if self.kernels not in KERNELS:
            raise SettingError("kernels", self.kernels, f"one of {', '.join(KERNELS)}", "choose one of those")

    def __call__(self, params: Params, inputs: Examples, targets: Examples, /) -> Tensor:
        """``inputs[B, ...], targets[B] -> losses[B]`` at ``params``; what is not in them stays as it is."""
        return self.criterion(self.outputs(params, inputs), targets)

    def outputs(self, params: Params, inputs: Examples, /) -> Any:
        """``inputs[B, ...] -> outputs[B, ...]`` of the module at ``params``."""
        if self.precision == "float32":
            return call(self.module, params, inputs)
        with torch.autocast(device_of(inputs).type, dtype=PRECISIONS[self.precision]):
            outputs = call(self.module, params, inputs)
        return tree_map(lambda t: t.float() if isinstance(t, Tensor) and t.is_floating_point() else t, outputs)


def check_types(params: Params) -> None:
    """Raise ``ModelError`` for parameters in which a bound and noise would be rounded: all but float32 and float64."""
    for name, p in params.items():
        if p.dtype not in WIDE:
            raise ModelError(
                f"parameter {name} is {str(p.dtype).removeprefix('torch.')}, which rounds clipped sums and noise; "
                "train in float32 (`module.float()`), with precision=bfloat16 if layers shall compute in that"
            )


def check_module(module: nn.Module) -> None:
    """Refuse layers that share statistics between examples: BatchNorm of any kind, InstanceNorm that tracks them."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(
            f"{type(module).__name__} is scripted, and its parameters cannot be replaced; use the module that "
            "torch.jit.script was given"
        )
    named = [f"{name} ({type(m).__name__})" for name, m in module.named_modules() if _mixes(m)]
    if named:
        raise ModelError(
            f"{type(module).__name__} has layers that mix examples: {', '.join(named)}; "
            "use GroupNorm or LayerNorm, or convert it with opacus.validators.ModuleValidator.fix"
        )


def _mixes(module: nn.Module) -> bool:
    return isinstance(module, BATCH_NORM) or (isinstance(module, INSTANCE_NORM) and module.track_running_stats)
