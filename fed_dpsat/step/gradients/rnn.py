"""torch's recurrent layers within a pass, cut into linear layers and one recurrence for each layer and direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fed_dpsat.step.gradients import recurrent
from fed_dpsat.step.gradients.contribution import check_versions, versions

CELLS = {torch.lstm: "LSTM", torch.gru: "GRU", torch.rnn_tanh: "RNN_TANH", torch.rnn_relu: "RNN_RELU"}


@dataclass(frozen=True, kw_only=True)
class Direction:
    """One direction of one layer, with its parameters."""

    cell: str
    weight: Tensor
    bias: Tensor | None
    projection: Tensor | None
    reverse: bool


def is_packed(args: Sequence[Any]) -> bool:
    """Whether ``args``, those of ``torch.lstm`` and its like, are of packed sequences."""
    return len(args) != 9 or not isinstance(args[2], tuple | list)


def answer(
    recurrence: Callable[..., list[Tensor]],
    func: Callable[..., Any],
    input: Tensor,
    hx: Any,
    params: Any,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """What ``torch.lstm`` and its like answer to one example, by linear layers and ``recurrence``.

    That makes outputs ``[1, T, H]`` and last states ``[1, H]`` of a ``Direction``, gates and first states.
    """
    cell, directions = CELLS[func], 2 if bidirectional else 1
    states = list(hx) if cell == "LSTM" else [hx]
    outputs = input if batch_first else input.transpose(0, 1)
    each = len(params) // (num_layers * directions)
    last: list[list[Tensor]] = [[] for _ in states]
    for layer in range(num_layers):
        made = []
        for direction in range(directions):
            number = layer * directions + direction
            weights = list(params[number * each : (number + 1) * each])
            biases = (weights[2], weights[3]) if has_biases else (None, None)
            projection = weights[-1] if each == (5 if has_biases else 3) else None
            gates = functional.linear(outputs, weights[0], biases[0])
            one = Direction(cell=cell, weight=weights[1], bias=biases[1], projection=projection, reverse=direction == 1)
            out, *finals = recurrence(one, gates, *(state[number] for state in states))
            made.append(out)
            for kept, final in zip(last, finals, strict=True):
                kept.append(final)
        outputs = torch.cat(made, -1) if directions == 2 else made[0]
        if dropout and train and layer < num_layers - 1:
            outputs = functional.dropout(outputs, dropout)
    ends = [torch.stack(finals) for finals in last]
    return (outputs if batch_first else outputs.transpose(0, 1), *ends)


class Recurrence(torch.autograd.Function):
    """The two passes of one direction; its parameters are not in the graph."""

    @staticmethod
    def forward(
        ctx: Any, tape: Any, of: Direction, anchor: Tensor, gates: Tensor, *states: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.tape, ctx.of = tape, of
        ctx.versions = versions((of.weight, of.bias, of.projection))
        weight, bias, projection = _detached(of)
        outputs, finals, saved = recurrent.forward(of.cell, gates, states, weight, bias, projection, of.reverse)
        ctx.save_for_backward(*saved)
        return (outputs, *finals)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        of: Direction = ctx.of
        tensors = {"weight": of.weight, "bias": of.bias, "projection": of.projection}
        check_versions(tensors.values(), ctx.versions)
        roles = tuple(role for role, t in tensors.items() if t is not None and t.requires_grad)
        weight, _, projection = _detached(of)
        gates, states, found = recurrent.backward(
            of.cell, grads[0], grads[1:], ctx.saved_tensors, weight, projection, of.reverse, roles=roles
        )
        for role, contribution in found.items():
            ctx.tape.add(tensors[role], contribution)
        return None, None, None, gates, *states


def _detached(of: Direction) -> tuple[Tensor, Tensor | None, Tensor | None]:
    bias, projection = (None if t is None else t.detach() for t in (of.bias, of.projection))
    return of.weight.detach(), bias, projection
