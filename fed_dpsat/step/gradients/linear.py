"""Linear layers: the per-example gradient is a sum of outer products, and seldom needs to exist."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fed_dpsat.step.gradients.contribution import Contribution, Rows, wide
from fed_dpsat.step.gradients.product import Product, bounded_norms, gram, product, single_norms

Roles = dict[str, Contribution]


@dataclass(frozen=True, kw_only=True)
class Linear:
    """``x[B, *, I] -> [B, *, O]``; ``strategy`` as ``choose`` says."""

    strategy: str

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output, and what the backward pass needs of ``x``."""
        return functional.linear(x, weight, bias), (x,)

    def backward(
        self, grad: Tensor, weight: Tensor, saved: tuple[Tensor, ...], need_input: bool, roles: tuple[str, ...]
    ) -> tuple[Tensor | None, Roles]:
        """Gradient of the input, and the contributions to the parameters in ``roles``."""
        found: Roles = {}
        (x,) = saved
        inputs = x.reshape(len(x), -1, x.shape[-1])
        outputs = grad.reshape(len(x), -1, grad.shape[-1])
        inputs, outputs = wide(inputs), wide(outputs)
        if "weight" in roles:
            found["weight"] = _held(self.strategy, inputs, outputs)
        if "bias" in roles:
            found["bias"] = Rows(data=outputs.sum(1))
        return (grad @ weight if need_input else None), found


def choose(positions: int, in_features: int, out_features: int) -> str:
    """``product`` (norms from two Gram matrices, then one weighted product) or ``rows``, by multiplications.

    Those of rows count half: with rows at hand, the weighted sum is one pass over memory. They tie at a third on one
    core, and rows take more memory.
    """
    product = 2 * positions * (in_features + out_features) if positions > 1 else 0
    return "product" if product < in_features * out_features else "rows"


def is_linear(held: Product) -> bool:
    """Whether ``held`` is the product of a linear layer."""
    return held.of is _of


def joined(parts: list[Product]) -> Product:
    """Several uses of one weight as one of it, at the positions of all."""
    if len(parts) == 1:
        return parts[0]
    inputs, outputs = (torch.cat([getattr(part, side) for part in parts], 1) for side in ("inputs", "outputs"))
    return _product(inputs, outputs)


def _held(strategy: str, inputs: Tensor, outputs: Tensor) -> Contribution:
    return _product(inputs, outputs) if strategy == "product" else Rows(data=_each(inputs, outputs))


def _product(inputs: Tensor, outputs: Tensor) -> Product:
    return product(inputs, outputs, of=_of, each=_each, together=_together, norms=_norms(inputs, outputs))


def _together(inputs: Tensor, outputs: Tensor, rows: int) -> Contribution:
    """One example of each ``rows``, which has the positions of all."""
    inputs, outputs = (t.reshape(len(t) // rows, -1, t.shape[2]) for t in (inputs, outputs))
    return _held(choose(inputs.shape[1], inputs.shape[2], outputs.shape[2]), inputs, outputs)


def _norms(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    if inputs.shape[1] == 1:
        return single_norms(inputs[:, 0], outputs[:, 0])
    return bounded_norms(gram(inputs), gram(outputs), inputs.shape[2] + outputs.shape[2])


def _of(inputs: Tensor, outputs: Tensor) -> Tensor:
    return outputs.flatten(0, 1).t() @ inputs.flatten(0, 1)


def _each(inputs: Tensor, outputs: Tensor) -> Tensor:
    return torch.bmm(outputs.transpose(1, 2), inputs)
