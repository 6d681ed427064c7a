"""Per-example losses: what every engine takes a gradient of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fed_dpsat.errors import ModelError
from fed_dpsat.params import Params


class LossFn(Protocol):
    """Losses ``[B]``, one per example, of a batch whose examples do not mix."""

    def __call__(self, params: Params, inputs: Tensor, targets: Tensor, /) -> Tensor:
        """``inputs[B, ...], targets[B, ...] -> losses[B]``."""


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """``outputs[B, K], targets[B] -> losses[B]``."""
    return functional.cross_entropy(outputs, targets, reduction="none")


@dataclass(frozen=True)
class ModelLoss:
    """The per-example loss of ``module`` as a function of its parameters.

    Raises ``ModelError`` for a module whose examples mix (BatchNorm and the like), naming the layer.
    """

    module: nn.Module
    criterion: Callable[[Tensor, Tensor], Tensor] = cross_entropy

    def __post_init__(self) -> None:
        check_module(self.module)

    def __call__(self, params: Params, inputs: Tensor, targets: Tensor, /) -> Tensor:
        """``inputs[B, ...], targets[B] -> losses[B]`` at ``params``; what is not in them stays as it is."""
        return self.criterion(functional_call(self.module, params, (inputs,)), targets)


def check_module(module: nn.Module) -> None:
    """Refuse layers that share statistics between examples; Opacus' validator finds them."""
    from opacus.validators import ModuleValidator  # type: ignore[import-untyped]  # seconds: imported when needed

    was_training = module.training
    errors = ModuleValidator.validate(module.train(), strict=False)
    module.train(was_training)
    if errors:
        named = [
            f"{name} ({type(m).__name__})" for name, m in module.named_modules() if "BatchNorm" in type(m).__name__
        ]
        raise ModelError(
            f"{type(module).__name__} has layers that mix examples: {', '.join(named) or errors[0]}; "
            "use GroupNorm or LayerNorm, or convert it with opacus.validators.ModuleValidator.fix"
        )
