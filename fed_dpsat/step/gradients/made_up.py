"""Examples and parameters that nobody has: what a module is tried on before it sees data."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fed_dpsat.params import Params
from fed_dpsat.step.gradients.loss import ModelLoss

Draw = Callable[[int, int], tuple[Tensor, Tensor]]
"""``batch, number -> inputs[batch, ...], targets[batch, ...]``, other ones for another number."""


def made_up_parameters(module: nn.Module, params: Params) -> Params:
    """Random values for ``params`` and for what else of ``module`` is frozen: a zero would hide what it multiplies."""
    generator = torch.Generator().manual_seed(0)
    held = {id(module.get_parameter(name)) for name in params}
    frozen = {name: p.detach() for name, p in module.named_parameters() if id(p) not in held}
    return {name: _like(p, generator) for name, p in {**params, **frozen}.items()}


def _like(p: Tensor, generator: torch.Generator) -> Tensor:
    """Normal, of the size that keeps a layer's outputs that of its inputs; vectors and numbers in [0.5, 1.5)."""
    if not p.is_floating_point():
        return p
    if p.ndim < 2:
        return (torch.rand(p.shape, generator=generator) + 0.5).to(p)
    return (torch.randn(p.shape, generator=generator) / math.sqrt(max(1, p[:1].numel()))).to(p)


def made_up(loss_fn: ModelLoss, params: Params, inputs: Tensor, targets: Tensor) -> Draw:
    """Examples with the shapes and types of ``inputs[B, ...]`` and ``targets[B, ...]``, on their device.

    Whole numbers are random too, as far as ``loss_fn`` takes them: the inputs below the length of a table that they
    are looked up in, the targets below the number of outputs. Raises what the module raises if it takes none.
    """
    with torch.no_grad():
        lengths = _lengths(loss_fn, params, inputs)
        words, outputs = _first_that_passes(lengths, lambda n: loss_fn.outputs(params, drawn(inputs, 2, 0, n)))
        classes, _ = _first_that_passes(
            _widths(outputs, targets), lambda n: loss_fn.criterion(outputs, drawn(targets, 2, 0, n))
        )

    def draw(batch: int, number: int) -> tuple[Tensor, Tensor]:
        return drawn(inputs, batch, 2 * number, words), drawn(targets, batch, 2 * number + 1, classes, low=0.0)

    return draw


def drawn(like: Tensor, batch: int, number: int, below: int, low: float | None = None) -> Tensor:
    """``[batch, *like.shape[1:]]``: whole numbers ``below``, or normal ones; from ``low`` to 1 above it if given."""
    generator, shape = torch.Generator().manual_seed(number), (batch, *like.shape[1:])
    if like.is_floating_point() or like.is_complex():
        random = (
            torch.randn(shape, generator=generator) if low is None else torch.rand(shape, generator=generator) + low
        )
        return random.to(like)
    return torch.randint(below if like.dtype != torch.bool else 2, shape, generator=generator).to(like)


class _Tables(TorchFunctionMode):
    """Notes the lengths of the tables that whole numbers are looked up in."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``; if it is a lookup, note of how many rows."""
        if func in (functional.embedding, functional.embedding_bag):
            weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
            self.lengths |= {len(weight)} if isinstance(weight, Tensor) else set()
        return func(*args, **(kwargs or {}))


def _lengths(loss_fn: ModelLoss, params: Params, inputs: Tensor) -> list[int]:
    """How large whole numbers may be, from what may be the most to what is the least; any for others."""
    if inputs.is_floating_point() or inputs.is_complex() or inputs.dtype == torch.bool:
        return [2]
    tables = _Tables()
    with tables:
        loss_fn.outputs(params, inputs.new_zeros(2, *inputs.shape[1:]))
    return [*sorted(tables.lengths, reverse=True), *([] if tables.lengths else [256, 2])]


def _widths(outputs: Any, targets: Tensor) -> list[int]:
    if targets.is_floating_point() or not isinstance(outputs, Tensor) or outputs.ndim < 2:
        return [2]
    return [outputs.shape[1], outputs.shape[-1], 2]


def _first_that_passes(candidates: list[int], attempt: Callable[[int], Any]) -> tuple[int, Any]:
    """The first number that ``attempt`` takes, and what it made of it; raises what it raises for the last one."""
    *more, last = candidates
    for below in more:
        with suppress(Exception):  # whatever a module says about numbers beyond its tables
            return below, attempt(below)
    return last, attempt(last)
